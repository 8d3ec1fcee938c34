//! What the guest says in words, made harmless: nothing in it may steer a
//! terminal or be of any length.

use bulkhead_agent::{Exit, Failure, Hello, Info, Life, Reply};

use crate::text::printable;

/// Longest text taken from the guest, in bytes; what follows is cut off.
const MAX: usize = 4096;

/// One text.
pub(super) fn text(words: &str) -> String {
    let bytes = words.as_bytes();
    printable(&bytes[..bytes.len().min(MAX)])
}

fn failure(failure: Failure) -> Failure {
    Failure {
        message: text(&failure.message),
        ..failure
    }
}

/// Every text of a Hello.
pub(super) fn hello(hello: Hello) -> Hello {
    Hello {
        version: hello.version,
        program: text(&hello.program),
        boot_id: text(&hello.boot_id),
    }
}

/// Every text of a Reply.
pub(super) fn reply(reply: Reply) -> Reply {
    match reply {
        Reply::Refused(refusal) => Reply::Refused(failure(refusal)),
        Reply::Info(told) => Reply::Info(info(told)),
        Reply::Life(life) => Reply::Life(Life {
            boot_id: text(&life.boot_id),
            session: text(&life.session),
            ..life
        }),
        Reply::Done | Reply::Started { .. } | Reply::Stat { .. } => reply,
    }
}

/// Every text of an Exit.
pub(super) fn exit(exit: Exit) -> Exit {
    Exit {
        failure: exit.failure.map(failure),
        ..exit
    }
}

fn info(mut info: Info) -> Info {
    let Info {
        os,
        kernel,
        hostname,
        uptime_ms: _,
        memory_kib: _,
        available_kib: _,
        interfaces,
        processes,
    } = &mut info;
    let mut texts = vec![os, kernel, hostname];
    for interface in interfaces {
        texts.extend([&mut interface.name, &mut interface.mac]);
        texts.extend(&mut interface.addresses);
    }
    texts.extend(processes.iter_mut().map(|process| &mut process.command));
    for word in texts {
        *word = text(word);
    }
    info
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_cut_and_cleaned() {
        let long = format!("\u{1b}[2J{}", "ä".repeat(5000));
        let cleaned = text(&long);
        assert!(cleaned.starts_with("\\u{1b}[2Jä") && cleaned.len() < MAX + 16);
    }
}
