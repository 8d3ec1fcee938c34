//! Loading the kernel modules the initramfs brings along.

use std::ffi::CStr;
use std::fs::{self, File};
use std::path::Path;

use bulkhead_agent::MODULES_DIR;
use nix::errno::Errno;
use nix::kmod::{ModuleInitFlags, finit_module};
use nix::sys::utsname::uname;

use crate::console::complain;
use crate::failure::{Context, Result};

/// Loads every module of the running kernel that is listed, in order. A kernel
/// with everything built in has no list, and nothing is done.
pub(super) fn load() {
    let Ok(kernel) = uname() else { return };
    let dir = Path::new(MODULES_DIR).join(kernel.release());
    let Ok(order) = fs::read_to_string(dir.join("order")) else {
        return;
    };
    for name in order.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Err(error) = load_one(&dir.join(name)) {
            complain!("{}", error.message);
        }
    }
}

fn load_one(path: &Path) -> Result<()> {
    let file = File::open(path).context(|| format!("cannot open module {}", path.display()))?;
    let flags = if path.extension().is_some_and(|end| end != "ko") {
        // MODULE_INIT_COMPRESSED_FILE, which nix does not name yet.
        ModuleInitFlags::from_bits_retain(4)
    } else {
        ModuleInitFlags::empty()
    };
    match finit_module(&file, c"" as &CStr, flags) {
        Err(Errno::EEXIST) => Ok(()),
        result => result.context(|| format!("cannot load module {}", path.display())),
    }
}
