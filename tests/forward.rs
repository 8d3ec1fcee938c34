//! Ports of this host that lead to services in a machine without a network.

mod support;

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::process::{Child, Stdio};
use std::time::Duration;

use serde_json::Value;
use support::{Bulkhead, printed};

/// A service in the guest that says hello and sends back what it gets, in
/// capitals, when that has ended.
const SERVICE: &str = r#"
use IO::Socket::INET;
$| = 1;
my $s = IO::Socket::INET->new(Listen => 50, LocalAddr => "127.0.0.1", LocalPort => 8000, ReuseAddr => 1) or die $!;
print "listening\n";
while (my $c = $s->accept) {
    next if fork;
    print $c "hello "; $c->flush;
    my $all = ""; while (sysread($c, my $part, 65536)) { $all .= $part }
    print $c uc $all; close $c; exit;
}
"#;

struct Forward {
    child: Child,
    address: SocketAddr,
    stderr: BufReader<std::process::ChildStderr>,
}

impl Forward {
    fn new(bulkhead: &Bulkhead, vm: &str, port: &str) -> Self {
        let mut command = bulkhead.command(&["forward", vm, port]);
        let mut child = command
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stderr = BufReader::new(child.stderr.take().unwrap());
        let mut line = String::new();
        stderr.read_line(&mut line).unwrap();
        let address = line
            .strip_prefix("bulkhead: ")
            .and_then(|rest| rest.split(' ').next());
        let address = address.and_then(|text| text.parse().ok());
        let address = address.unwrap_or_else(|| panic!("{line:?}"));
        Self {
            child,
            address,
            stderr,
        }
    }

    fn connect(&self) -> TcpStream {
        let stream = TcpStream::connect(self.address).unwrap();
        stream
            .set_read_timeout(Some(Duration::from_secs(60)))
            .unwrap();
        stream
    }
}

impl Drop for Forward {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The first value that a call prints, which is ended then.
fn told_in_json(bulkhead: &Bulkhead, words: &[&str]) -> Value {
    let mut command = bulkhead.command(words);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = child.stdout.take().unwrap();
    let told = serde_json::Deserializer::from_reader(stdout)
        .into_iter()
        .next();
    child.kill().unwrap();
    child.wait().unwrap();
    told.unwrap().unwrap()
}

#[test]
fn a_service_without_a_network_is_reached_from_the_host() {
    let bulkhead = Bulkhead::new().with_own_state();
    let vm = bulkhead.create("fwd", &["--", "perl", "-e", SERVICE]);
    bulkhead.must_fail(&["forward", "fwd", "0:8000"], "state-conflict");
    vm.start();
    let begin = std::time::Instant::now();
    while !bulkhead.must(&["logs", "fwd"]).contains("listening") {
        assert!(
            begin.elapsed() < Duration::from_secs(60),
            "{}",
            vm.inspect()
        );
        std::thread::sleep(Duration::from_millis(100));
    }
    let mut forward = Forward::new(&bulkhead, "fwd", "0:8000");
    assert!(forward.address.ip().is_loopback());
    let told = told_in_json(&bulkhead, &["--json", "forward", "fwd", "0:8000"]);
    printed::check("forward", &told);
    let all: Vec<_> = told["forwarded"].as_array().unwrap().iter().collect();
    let ends = |one: &Value| one.as_str().unwrap().ends_with(":8000");
    assert!(all.len() == 1 && ends(all[0]), "{told}");

    // The service speaks first, and hears the end of what it is told.
    let mut one = forward.connect();
    let mut hello = [0; 6];
    one.read_exact(&mut hello).unwrap();
    assert_eq!(&hello, b"hello ");
    let much = "abcdefghij".repeat(100_000);
    one.write_all(much.as_bytes()).unwrap();
    one.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    one.read_to_string(&mut answer).unwrap();
    assert!(
        answer == much.to_uppercase(),
        "{} bytes came back",
        answer.len()
    );

    // Several at a time, each with its own answer; more than there are places.
    let all: Vec<_> = (0..60).map(|number| (number, forward.connect())).collect();
    for (number, mut stream) in all {
        stream.write_all(format!("n{number}").as_bytes()).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).unwrap();
        assert_eq!(answer, format!("hello N{number}"));
    }
    // Clients that go away leave nothing in the way.
    for _ in 0..60 {
        drop(forward.connect());
    }
    let mut stream = forward.connect();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    assert_eq!(answer, "hello ");

    // Where nobody listens in the guest, the connection ends and it is told why.
    let mut closed = Forward::new(&bulkhead, "fwd", "0:8001");
    let mut stream = closed.connect();
    assert!(matches!(stream.read(&mut [0; 8]), Ok(0) | Err(_)));
    let mut line = String::new();
    closed.stderr.read_line(&mut line).unwrap();
    assert!(
        line.contains("connect to port 8001") && line.contains("refused"),
        "{line:?}"
    );

    // It ends with the machine.
    bulkhead.must(&["stop", "fwd"]);
    let mut rest = String::new();
    forward.stderr.read_to_string(&mut rest).unwrap();
    assert_eq!(forward.child.wait().unwrap().code(), Some(125), "{rest}");
    for wrong in ["x", "0", "1.2.3.4:80:90:1", "0:0"] {
        let ran = bulkhead.raw(&["forward", "fwd", wrong]);
        assert_eq!(ran.code, 125, "{ran:?}");
    }
    drop(vm);
}

#[test]
fn a_machine_that_serves_a_connection_is_not_idle() {
    let bulkhead = Bulkhead::new().with_own_state();
    let port = free_port();
    let publish = format!("{port}:8000");
    let vm = bulkhead.create("serves", &["--publish", &publish, "--start"]);
    let background = format!("perl -e '{SERVICE}' >/dev/null 2>&1 </dev/null &");
    bulkhead.must(&["exec", "serves", "sh", "-c", &background]);
    assert_eq!(talk(port), "hello WORLD");
    // Nobody says a word, but somebody is there.
    let open = TcpStream::connect(("127.0.0.1", port)).unwrap();
    bulkhead.must(&["set", "serves", "--idle-timeout", "2s"]);
    std::thread::sleep(Duration::from_secs(6));
    assert_eq!(vm.state(), "running");
    drop(open);
    assert_eq!(vm.becomes("stopped")["reason"], "idle for 2s");
}

/// A port that nobody has.
fn free_port() -> u16 {
    static NEXT: std::sync::atomic::AtomicU16 = std::sync::atomic::AtomicU16::new(0);
    // Below those that connections get by themselves, and not another test's.
    let own = NEXT.fetch_add(100, std::sync::atomic::Ordering::Relaxed);
    let first = 20_000 + u16::try_from(std::process::id() % 10_000).unwrap() + own;
    let free = |port: &u16| std::net::TcpListener::bind(("127.0.0.1", *port)).is_ok();
    (first..32_000).find(free).unwrap()
}

/// What the service says to a connection at this port, once it is there.
fn talk(port: u16) -> String {
    let begin = std::time::Instant::now();
    loop {
        let talk = || {
            let mut stream = TcpStream::connect(("127.0.0.1", port))?;
            stream.set_read_timeout(Some(Duration::from_secs(20)))?;
            stream.write_all(b"world")?;
            stream.shutdown(Shutdown::Write)?;
            let mut text = String::new();
            stream.read_to_string(&mut text)?;
            Ok::<_, std::io::Error>(text)
        };
        match talk() {
            Ok(text) if !text.is_empty() => return text,
            said => assert!(begin.elapsed() < Duration::from_secs(60), "{said:?}"),
        }
        std::thread::sleep(Duration::from_millis(200));
    }
}

#[test]
fn a_published_port_lives_as_long_as_its_machine() {
    let bulkhead = Bulkhead::new().with_own_state();
    let port = free_port();
    let publish = format!("{port}:8000");
    let options = ["--publish", &publish, "--survivors", "adopt"];
    let vm = bulkhead.create("pub", &[&options[..], &["--start"]].concat());
    let background = format!("perl -e '{SERVICE}' >/dev/null 2>&1 </dev/null &");
    bulkhead.must(&["exec", "pub", "sh", "-c", &background]);
    assert_eq!(talk(port), "hello WORLD");

    // Somebody else wants it, and there is no machine then.
    let second = bulkhead.create("second", &options);
    bulkhead.must_fail(&["start", "second"], "port-unusable");
    assert_eq!(second.state(), "failed");
    let any = ["run", "--publish", "0:80", "--", "true"];
    bulkhead.must_fail(&any, "value-invalid");

    nix::sys::signal::kill(vm.supervisor(), nix::sys::signal::Signal::SIGKILL).unwrap();
    vm.becomes("lost");
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
    assert!(bulkhead.must(&["gc"]).contains("took over pub"));
    assert_eq!(talk(port), "hello WORLD");
    bulkhead.must(&["stop", "--force", "pub"]);
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());

    // A run has it while its command runs.
    let run = [
        "run",
        "--accel",
        &support::accel(),
        "--image",
        "base",
        "--kernel",
        "tuned",
    ];
    let run = [
        &run[..],
        &["--publish", &publish, "--", "perl", "-e", SERVICE],
    ]
    .concat();
    let mut run = bulkhead
        .command(&run)
        .stdout(Stdio::null())
        .spawn()
        .unwrap();
    assert_eq!(talk(port), "hello WORLD");
    let pid = nix::unistd::Pid::from_raw(run.id().cast_signed());
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
    run.wait().unwrap();
    assert!(TcpStream::connect(("127.0.0.1", port)).is_err());
}
