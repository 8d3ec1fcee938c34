//! From a request to what the child needs: environment, program, directory.

use std::ffi::CString;
use std::io;

use bulkhead_agent::Exec;

use super::user::User;
use crate::failure::{Context, Result, invalid};

const USER_PATH: &str = "/usr/local/bin:/usr/bin:/bin:/usr/local/games:/usr/games";
const ROOT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Strings as the kernel wants them.
#[derive(Debug)]
pub(super) struct Prepared {
    pub(super) programs: Vec<CString>,
    pub(super) argv: Vec<CString>,
    pub(super) env: Vec<CString>,
    pub(super) cwd: CString,
}

impl Prepared {
    /// Checks a request and completes it for `user`.
    ///
    /// # Errors
    /// No program, a name or value that cannot be, or no such directory.
    pub(super) fn new(request: &Exec, user: &User) -> Result<Self> {
        let program = request.argv.first().filter(|name| !name.is_empty());
        let program = program.ok_or_else(|| invalid("no program to run: argv is empty"))?;
        let env = environment(request, user)?;
        let path = env.iter().find(|(name, _)| name == "PATH");
        let programs = candidates(program, path.map_or("", |(_, value)| value));
        Ok(Self {
            programs: programs
                .iter()
                .map(|s| c_string(s))
                .collect::<Result<_>>()?,
            argv: request
                .argv
                .iter()
                .map(|s| c_string(s))
                .collect::<Result<_>>()?,
            env: env
                .iter()
                .map(|(name, value)| c_string(&format!("{name}={value}")))
                .collect::<Result<_>>()?,
            cwd: c_string(directory(request, user)?)?,
        })
    }
}

fn environment(request: &Exec, user: &User) -> Result<Vec<(String, String)>> {
    let path = if user.uid == 0 { ROOT_PATH } else { USER_PATH };
    let mut env: Vec<(String, String)> = [
        ("HOME", &user.home[..]),
        ("USER", &user.name),
        ("LOGNAME", &user.name),
        ("SHELL", &user.shell),
        ("PATH", path),
        ("LANG", "C.UTF-8"),
    ]
    .map(|(name, value)| (name.to_owned(), value.to_owned()))
    .into();
    if request.terminal.is_some() {
        env.push(("TERM".into(), "xterm-256color".into()));
    }
    for (name, value) in &request.env {
        if name.is_empty() || name.contains('=') {
            return Err(invalid(format!(
                "{name:?} cannot be the name of a variable"
            )));
        }
        env.retain(|(old, _)| old != name);
        env.push((name.clone(), value.clone()));
    }
    Ok(env)
}

/// The paths a program may be at, as execvp(3) looks for it.
fn candidates(program: &str, path: &str) -> Vec<String> {
    if program.contains('/') {
        return vec![program.to_owned()];
    }
    path.split(':')
        .map(|dir| match dir {
            "" => program.to_owned(),
            dir => format!("{dir}/{program}"),
        })
        .collect()
}

fn directory<'a>(request: &'a Exec, user: &'a User) -> Result<&'a str> {
    let Some(cwd) = &request.cwd else {
        let exists = std::path::Path::new(&user.home).is_dir();
        return Ok(if exists { &user.home } else { "/" });
    };
    let kind = std::fs::metadata(cwd);
    match kind {
        Ok(meta) if meta.is_dir() => Ok(cwd),
        Ok(_) => Err(invalid(format!(
            "working directory {cwd} is not a directory"
        ))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            Err(invalid(format!("working directory {cwd} does not exist")))
        }
        Err(error) => Err(error).context(|| format!("cannot use working directory {cwd}")),
    }
}

fn c_string(text: &str) -> Result<CString> {
    CString::new(text).map_err(|_| invalid(format!("{text:?} contains a zero byte")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_are_looked_up_in_path_unless_they_are_paths() {
        assert_eq!(candidates("ls", "/a::/b"), ["/a/ls", "ls", "/b/ls"]);
        assert_eq!(candidates("./ls", "/a"), ["./ls"]);
    }
}
