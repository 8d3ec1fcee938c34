//! The real agent as a service, over a socket pair: commands and the protocol.
#![allow(unsafe_code, missing_docs)] // handing a descriptor to a child

mod support;

use std::time::{Duration, Instant};

use bulkhead_agent::*;
use support::{Agent, Seen, command, sh};

fn text(bytes: &[u8]) -> &str {
    std::str::from_utf8(bytes).unwrap()
}

fn code(seen: &Seen) -> Option<i32> {
    seen.exit.as_ref().unwrap().code
}

fn refusal(seen: &Seen) -> FailureKind {
    let Some(Reply::Refused(failure)) = &seen.reply else {
        panic!("not refused: {seen:?}");
    };
    assert_eq!(seen.exit.as_ref().unwrap().failure.as_ref(), Some(failure));
    failure.kind
}

#[test]
fn the_exit_code_and_both_streams_come_back() {
    let mut agent = Agent::start();
    let seen = agent.sh("echo out; echo err >&2; exit 7");
    assert_eq!((text(&seen.out), text(&seen.err)), ("out\n", "err\n"));
    assert_eq!(code(&seen), Some(7));
    assert!(matches!(seen.reply, Some(Reply::Started { pid }) if pid > 1));
    let exit = agent.sh("kill -9 $$").exit.unwrap();
    assert_eq!((exit.code, exit.signal), (None, Some(9)));
    let exit = agent
        .sh("i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done")
        .exit
        .unwrap();
    assert!(exit.cpu_us > 0 && exit.max_rss_kib > 0);
}

#[test]
fn the_environment_is_a_login_environment() {
    let mut agent = Agent::start();
    let seen = agent.run(Exec {
        env: vec![("X".into(), "a b".into()), ("LANG".into(), "C".into())],
        ..sh("echo $USER $HOME $LANG $X $PATH; pwd; umask; ls /proc/self/fd | wc -l; cat")
    });
    let path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    let expected = format!("root /root C a b {path}\n/root\n0022\n4\n");
    assert_eq!(text(&seen.out), expected);
}

#[test]
fn commands_run_as_the_user_asked_for() {
    let mut agent = Agent::start();
    let seen = agent.run(Exec {
        user: Some("nobody".into()),
        cwd: Some("/tmp".into()),
        ..sh("id -un; id -G; pwd")
    });
    assert_eq!(text(&seen.out), "nobody\n65534\n/tmp\n", "{seen:?}");
    let seen = agent.run(Exec {
        user: Some("54321".into()),
        ..sh("id -u; id -g")
    });
    assert_eq!(text(&seen.out), "54321\n54321\n");
}

#[test]
fn input_arrives_whole_and_ends() {
    let mut agent = Agent::start();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|i| (i % 251) as u8).collect();
    let stream = agent.open(&Request::Exec(Exec {
        stdin: true,
        ..command(&["cat"])
    }));
    agent.feed(stream, &bytes);
    let seen = agent.finish(stream);
    assert!(seen.out == bytes);
    assert_eq!(seen.credit, bytes.len() as u64);
}

#[test]
fn input_nobody_reads_does_not_block() {
    let mut agent = Agent::start();
    let stream = agent.open(&Request::Exec(Exec {
        stdin: true,
        ..sh("exec <&-; sleep 0.5; echo over")
    }));
    agent.feed(stream, &vec![0; 4 << 20]);
    assert_eq!(text(&agent.finish(stream).out), "over\n");
}

#[test]
fn refusals_say_why() {
    let mut agent = Agent::start();
    let dir = tempfile::tempdir().unwrap();
    let script = dir.path().join("script");
    std::fs::write(&script, "echo no").unwrap();
    let script = script.to_str().unwrap();
    assert_eq!(
        refusal(&agent.run(command(&["no-such-program"]))),
        FailureKind::NotFound
    );
    assert_eq!(
        refusal(&agent.run(command(&["/no/such"]))),
        FailureKind::NotFound
    );
    assert_eq!(
        refusal(&agent.run(command(&[script]))),
        FailureKind::NotExecutable
    );
    assert_eq!(
        refusal(&agent.run(command(&["/etc"]))),
        FailureKind::NotExecutable
    );
    assert_eq!(refusal(&agent.run(command(&[]))), FailureKind::Invalid);
    let with = |change: fn(&mut Exec)| {
        let mut exec = sh("true");
        change(&mut exec);
        exec
    };
    let exec = with(|exec| exec.user = Some("no-such-user".into()));
    assert_eq!(refusal(&agent.run(exec)), FailureKind::NoUser);
    let exec = with(|exec| exec.cwd = Some("/no/such".into()));
    assert_eq!(refusal(&agent.run(exec)), FailureKind::Invalid);
    let exec = with(|exec| exec.env = vec![("A=B".into(), "C".into())]);
    assert_eq!(refusal(&agent.run(exec)), FailureKind::Invalid);
    for of_a_machine in [Request::PowerOff, Request::Grow { bytes: 1 << 30 }] {
        let id = agent.open(&of_a_machine);
        assert_eq!(refusal(&agent.finish(id)), FailureKind::Invalid);
    }
    agent.streams.insert(77, Seen::default());
    agent.send(77, Kind::Open, b"{\"request\":\"dance\"}");
    let unknown = agent.finish(77);
    assert_eq!(refusal(&unknown), FailureKind::Invalid);
    // The host tells an agent that is too old by these words.
    let words = unknown.exit.unwrap().failure.unwrap().message;
    assert!(words.contains(UNKNOWN_REQUEST), "{words}");
    agent.streams.insert(79, Seen::default());
    agent.send(
        79,
        Kind::Open,
        b"{\"request\":\"configure\",\"shoes\":true}",
    );
    let unknown = agent.finish(79);
    assert_eq!(refusal(&unknown), FailureKind::Invalid);
    let words = unknown.exit.unwrap().failure.unwrap().message;
    assert!(words.contains(UNKNOWN_PART), "{words}");
}

#[test]
fn a_terminal_has_a_size_that_can_change() {
    let mut agent = Agent::start();
    let stream = agent.open(&Request::Exec(Exec {
        terminal: Some(Size { rows: 11, cols: 22 }),
        stdin: true,
        ..sh("stty size; tty; trap 'stty size; exit 3' WINCH; echo ready; while :; do sleep 0.05; done")
    }));
    agent.until(stream, |seen| text(&seen.out).contains("ready"));
    agent.control(stream, &Control::Resize(Size { rows: 33, cols: 44 }));
    let seen = agent.finish(stream);
    let out = text(&seen.out);
    assert!(out.starts_with("11 22\r\n/dev/pts/"), "{out}");
    assert!(out.ends_with("33 44\r\n"), "{out}");
    assert_eq!(code(&seen), Some(3));
}

#[test]
fn control_c_and_end_of_input_work_on_a_terminal() {
    let mut agent = Agent::start();
    let terminal = Some(Size { rows: 24, cols: 80 });
    let exec = Exec {
        terminal,
        stdin: true,
        ..sh("echo ready; exec sleep 60")
    };
    let stream = agent.open(&Request::Exec(exec));
    agent.until(stream, |seen| text(&seen.out).contains("ready"));
    agent.send(stream, Kind::In, b"\x03");
    assert_eq!(agent.finish(stream).exit.unwrap().signal, Some(2));
    let exec = Exec {
        terminal,
        stdin: true,
        ..command(&["cat"])
    };
    let stream = agent.open(&Request::Exec(exec));
    agent.feed(stream, b"line\n");
    let seen = agent.finish(stream);
    assert_eq!(text(&seen.out), "line\r\nline\r\n");
}

#[test]
fn kill_ends_the_whole_tree() {
    let mut agent = Agent::start();
    let stream = agent.open(&Request::Exec(sh(
        "(setsid sh -c 'echo $$; exec sleep 61' & sleep 62 & wait) & echo $!; wait",
    )));
    agent.until(stream, |seen| {
        seen.out.iter().filter(|b| **b == b'\n').count() == 2
    });
    agent.control(stream, &Control::Kill);
    let seen = agent.finish(stream);
    assert_eq!(seen.exit.as_ref().unwrap().signal, Some(9));
    for pid in text(&seen.out).lines() {
        let deadline = Instant::now() + Duration::from_secs(60);
        while std::fs::read_to_string(format!("/proc/{pid}/stat"))
            .is_ok_and(|s| !s.contains(") Z "))
        {
            assert!(Instant::now() < deadline, "{pid} survived");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

#[test]
fn a_signal_reaches_the_process_group() {
    let mut agent = Agent::start();
    let stream = agent.open(&Request::Exec(sh(
        "trap 'echo got; exit 4' TERM; echo ready; while :; do sleep 0.05; done",
    )));
    agent.until(stream, |seen| text(&seen.out).contains("ready"));
    agent.control(stream, &Control::Signal { signal: 15 });
    let seen = agent.finish(stream);
    assert_eq!((text(&seen.out), code(&seen)), ("ready\ngot\n", Some(4)));
}

#[test]
fn the_background_does_not_hold_the_exit_back() {
    let mut agent = Agent::start();
    let start = Instant::now();
    let seen = agent.sh("sleep 30 & echo $!");
    assert!(start.elapsed() < Duration::from_secs(20));
    let pid = text(&seen.out).trim();
    assert!(std::fs::exists(format!("/proc/{pid}")).unwrap());
    nix::sys::signal::kill(
        nix::unistd::Pid::from_raw(pid.parse().unwrap()),
        nix::sys::signal::Signal::SIGKILL,
    )
    .unwrap();
}

#[test]
fn a_hundred_megabytes_arrive_with_flat_memory() {
    let mut agent = Agent::start();
    agent.keeping = false;
    let stream = agent.open(&Request::Exec(sh("head -c 100000000 /dev/zero")));
    let mut peak = 0;
    let mut frames = 0;
    while agent.streams[&stream].exit.is_none() {
        agent.step();
        frames += 1;
        if frames % 100 == 0 {
            peak = peak.max(agent.rss_kib());
        }
    }
    assert_eq!(agent.streams[&stream].out_total, 100_000_000);
    assert!(peak > 0 && peak < 32 * 1024, "{peak} KiB");
}

#[test]
fn without_credit_a_stream_waits_and_others_do_not() {
    let mut agent = Agent::start();
    agent.crediting = false;
    // More than there are places for data frames.
    let stuck: Vec<u32> = (0..100)
        .map(|_| agent.open(&Request::Exec(sh("head -c 2000000 /dev/zero"))))
        .collect();
    for id in &stuck {
        agent.until(*id, |seen| seen.held == WINDOW);
    }
    let seen = agent.sh("echo hello");
    assert_eq!(text(&seen.out), "hello\n");
    agent.crediting = true;
    for id in stuck {
        agent.streams.get_mut(&id).unwrap().held = 0;
        agent.send(id, Kind::Credit, &WINDOW.to_le_bytes());
        let seen = agent.finish(id);
        assert_eq!((seen.out.len(), code(&seen)), (2_000_000, Some(0)));
    }
}

#[test]
fn two_hundred_commands_at_once_all_answer() {
    let mut agent = Agent::start();
    let ids: Vec<u32> = (0..200)
        .map(|n| {
            agent.open(&Request::Exec(sh(&format!(
                "sleep 0.2; echo {n}; exit {}",
                n % 100
            ))))
        })
        .collect();
    for (n, id) in ids.into_iter().enumerate() {
        let seen = agent.finish(id);
        assert_eq!(text(&seen.out), format!("{n}\n"));
        assert_eq!(code(&seen), Some(n as i32 % 100));
    }
}

#[test]
fn one_stream_too_many_is_refused() {
    let mut agent = Agent::start();
    let waiting = Exec {
        stdin: true,
        ..command(&["cat"])
    };
    let ids: Vec<u32> = (0..MAX_STREAMS)
        .map(|_| agent.open(&Request::Exec(waiting.clone())))
        .collect();
    let over = agent.open(&Request::Ping);
    assert_eq!(refusal(&agent.finish(over)), FailureKind::Invalid);
    agent.send(ids[0], Kind::End, &[]);
    assert_eq!(code(&agent.finish(ids[0])), Some(0));
    let again = agent.open(&Request::Ping);
    assert_eq!(agent.finish(again).reply, Some(Reply::Done));
}

#[test]
fn a_hello_ends_what_ran_before() {
    let mut agent = Agent::start();
    let stream = agent.open(&Request::Exec(sh("echo $$; exec sleep 60")));
    agent.until(stream, |seen| seen.out.ends_with(b"\n"));
    let pid = text(&agent.streams[&stream].out).trim().to_owned();
    agent.hello();
    agent.expect_hello();
    agent.open_as(stream, &Request::Ping);
    assert_eq!(agent.finish(stream).reply, Some(Reply::Done));
    let deadline = Instant::now() + Duration::from_secs(60);
    while std::fs::exists(format!("/proc/{pid}")).unwrap() {
        assert!(Instant::now() < deadline, "{pid} survived");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn after_a_violation_only_a_hello_helps() {
    let violations: [fn(&mut Agent); 6] = [
        |agent| agent.send(1, Kind::Out, b"x"),
        |agent| agent.send(9, Kind::Control, b"{}"),
        |agent| {
            agent.open_as(9, &Request::Exec(command(&["cat"])));
            agent.open_as(9, &Request::Ping);
        },
        |agent| agent.send(9, Kind::Credit, &1_u32.to_le_bytes()),
        |agent| {
            agent.open_as(
                8,
                &Request::Exec(Exec {
                    stdin: true,
                    ..sh("sleep 60")
                }),
            );
            // One frame is in the pipe, one on its way there.
            (0..12).for_each(|_| agent.send(8, Kind::In, &[0; MAX_PAYLOAD]));
        },
        |agent| {
            use std::io::Write;
            agent.channel.write_all(&[0xff; 1000]).unwrap();
        },
    ];
    for (n, violation) in violations.into_iter().enumerate() {
        let mut agent = Agent::start();
        agent.open_as(9, &Request::Exec(sh("sleep 60")));
        agent.until(9, |seen| seen.reply.is_some());
        violation(&mut agent);
        // Not served: the agent has lost faith.
        agent.open_as(support::UNSERVED, &Request::Ping);
        agent.hello();
        agent.expect_hello();
        agent.streams.clear();
        agent.open_as(200, &Request::Ping);
        assert_eq!(agent.finish(200).reply, Some(Reply::Done), "violation {n}");
    }
}

#[test]
fn a_port_of_the_guest_is_connected_to_both_ways() {
    use std::io::{Read as _, Write as _};
    let mut agent = Agent::start();
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    // Says something first, then sends back what it got when that has ended.
    let service = std::thread::spawn(move || {
        let (mut connection, _) = listener.accept().unwrap();
        connection.write_all(b"hello ").unwrap();
        let mut all = Vec::new();
        connection.read_to_end(&mut all).unwrap();
        connection.write_all(&all).unwrap();
        listener
    });
    let stream = agent.open(&Request::Connect { port });
    agent.until(stream, |seen| seen.out == b"hello ");
    let much: Vec<u8> = (0..3_000_000_u32).map(|number| number as u8).collect();
    agent.feed(stream, &much);
    let seen = agent.finish(stream);
    assert_eq!(code(&seen), Some(0));
    assert!(seen.out[6..] == much, "{} bytes came back", seen.out.len());
    // One that is given up is closed towards the service.
    let listener = service.join().unwrap();
    let stream = agent.open(&Request::Connect { port });
    let (mut connection, _) = listener.accept().unwrap();
    agent.until(stream, |seen| seen.reply.is_some());
    agent.control(stream, &Control::Kill);
    let limit = Some(Duration::from_secs(10));
    connection.set_read_timeout(limit).unwrap();
    assert!(matches!(connection.read(&mut [0; 8]), Ok(0) | Err(_)));
    agent.finish(stream);
    drop(listener);
    for port in [port, 0] {
        let stream = agent.open(&Request::Connect { port });
        let seen = agent.finish(stream);
        let Some(Reply::Refused(failure)) = seen.reply else {
            panic!("{seen:?}")
        };
        assert!(
            failure.message.contains(&port.to_string()),
            "{}",
            failure.message
        );
    }
}
