//! The program under test, with directories of its own and the prepared images.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

/// The `bulkhead` binary, on the state directory that `cargo xtask test` prepared.
pub(crate) struct Bulkhead {
    state: PathBuf,
    runtime: tempfile::TempDir,
    image: &'static str,
}

/// What one call gave.
#[derive(Debug)]
pub(crate) struct Ran {
    pub stdout: String,
    pub stderr: String,
    pub code: i32,
}

impl Bulkhead {
    /// Runs use the small image.
    pub(crate) fn new() -> Self {
        Self::with_image("base")
    }

    pub(crate) fn with_image(image: &'static str) -> Self {
        let state = std::env::var_os("BULKHEAD_TEST_STATE")
            .expect("these tests need images: run them with `cargo xtask test`");
        Self {
            state: state.into(),
            runtime: tempfile::tempdir().unwrap(),
            image,
        }
    }

    /// `bulkhead run` under emulation; options come before `--`.
    pub(crate) fn run(&self, words: &[&str]) -> Ran {
        self.run_with_input(words, b"")
    }

    pub(crate) fn run_with_input(&self, words: &[&str], input: &[u8]) -> Ran {
        let fixed = ["run", "--accel", "tcg", "--image", self.image];
        self.call(&[&fixed, words].concat(), input)
    }

    /// Any call.
    pub(crate) fn raw(&self, words: &[&str]) -> Ran {
        self.call(words, b"")
    }

    fn call(&self, words: &[&str], input: &[u8]) -> Ran {
        let mut child = Command::new(env!("CARGO_BIN_EXE_bulkhead"))
            .args(words)
            .env("BULKHEAD_STATE_DIR", &self.state)
            .env("BULKHEAD_RUNTIME_DIR", self.runtime.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        // A program that ends early does not take its input.
        let _ = child.stdin.take().unwrap().write_all(input);
        let output = child.wait_with_output().unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ran {
            stdout: text(output.stdout),
            stderr: text(output.stderr),
            code: output.status.code().unwrap_or(-1),
        }
    }
}
