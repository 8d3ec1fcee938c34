//! `bulkhead net log`.

use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Seek, Write, stdout};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::Global;
use super::message::{Failure, visible};
use super::table::clock;
use crate::net::{Endpoint, Event, Excepted, QueryResult, Refusal, What};
use crate::run::{Record, RecordError, record_files};
use crate::spec::VmId;
use crate::supervise::Machines;

/// How often a record that is followed is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Options.
#[derive(Debug, clap::Args)]
pub(super) struct Log {
    /// Name of a machine.
    vm: VmId,
    /// Go on with what comes, until the machine has ended.
    #[arg(long, short)]
    follow: bool,
    /// Only what was refused.
    #[arg(long)]
    refused: bool,
}

/// Prints the record of a machine's network: events in words, or with `--json`
/// one a line.
pub(super) async fn run(args: Log, global: &Global) -> Result<i32, Failure> {
    let host = global.host()?;
    // A name nobody has is no empty record.
    Record::spec(&host.dirs, &args.vm)?;
    let dir = host.dirs.run(&args.vm);
    let machines = Machines::new(host);
    let printer = Printer {
        json: global.json,
        refused: args.refused,
    };
    let [aside, now] = record_files(&dir);
    let mut tail = Tail::new(now.clone());
    if let Some(old) = open(&aside)? {
        let mut old = Tail {
            path: aside,
            reader: Some(BufReader::new(old)),
            half: String::new(),
        };
        if !old.print(&printer)? {
            return Ok(0);
        }
    }
    loop {
        // Looked at first: what it does in the meantime is printed then.
        let live = args.follow && is_live(&machines, &dir, &args.vm).await;
        if !tail.print(&printer)? || !live {
            return Ok(0);
        }
        tokio::time::sleep(LOOK).await;
    }
}

/// Whether more may come. A run's record is gone with it.
async fn is_live(machines: &Machines, dir: &Path, vm: &VmId) -> bool {
    match machines.look(vm).await {
        Ok(view) => view.state.is_live(),
        Err(_) => dir.exists(),
    }
}

/// A file, where it is there: a machine may not have had a network yet.
fn open(path: &Path) -> Result<Option<File>, Failure> {
    match File::open(path) {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
        Err(source) => Err(unreadable(path, source)),
    }
}

fn unreadable(path: &Path, source: std::io::Error) -> Failure {
    let path = path.to_owned();
    let action = "read";
    RecordError::Io {
        action,
        path,
        source,
    }
    .into()
}

/// A record that grows, and is put aside when it is long.
struct Tail {
    path: PathBuf,
    reader: Option<BufReader<File>>,
    /// The beginning of a line whose end is not written yet.
    half: String,
}

impl Tail {
    fn new(path: PathBuf) -> Self {
        Self {
            path,
            reader: None,
            half: String::new(),
        }
    }

    /// Prints what is new. Gives whether anybody reads it.
    fn print(&mut self, printer: &Printer) -> Result<bool, Failure> {
        if !self.rest(printer)? {
            return Ok(false);
        }
        let found = open(&self.path)?;
        let inode = |file: &File| file.metadata().map(|meta| meta.ino()).ok();
        let same = match (&self.reader, &found) {
            (Some(reader), Some(found)) => inode(reader.get_ref()) == inode(found),
            (_, None) => true,
            (None, Some(_)) => false,
        };
        if same {
            return Ok(true);
        }
        // What came into the old one up to now.
        if !self.rest(printer)? {
            return Ok(false);
        }
        self.reader = found.map(BufReader::new);
        self.rest(printer)
    }

    fn rest(&mut self, printer: &Printer) -> Result<bool, Failure> {
        let Some(reader) = &mut self.reader else {
            return Ok(true);
        };
        loop {
            // A line that could not be written in full was taken back.
            let at = reader.stream_position();
            let length = reader.get_ref().metadata().map(|meta| meta.len());
            if let (Ok(at), Ok(length)) = (at, length)
                && length < at
            {
                self.half.clear();
                let to = std::io::SeekFrom::Start(length);
                reader
                    .seek(to)
                    .map_err(|error| unreadable(&self.path, error))?;
            }
            let read = reader.read_line(&mut self.half);
            match read.map_err(|error| unreadable(&self.path, error))? {
                0 => return Ok(true),
                _ if !self.half.ends_with('\n') => {}
                _ => {
                    let line = std::mem::take(&mut self.half);
                    if !printer.print(line.trim_end()) {
                        return Ok(false);
                    }
                }
            }
        }
    }
}

struct Printer {
    json: bool,
    refused: bool,
}

impl Printer {
    /// Prints an event. Gives whether anybody reads it.
    fn print(&self, line: &str) -> bool {
        // One that another version wrote is passed on, or left out.
        let event = serde_json::from_str::<Event>(line).ok();
        let refusal = event.as_ref().and_then(|event| event.what.refusal());
        if self.refused && refusal.is_none() {
            return true;
        }
        let text = match (self.json, event) {
            (true, _) => line.to_owned(),
            (false, Some(event)) => visible(&text(&event)),
            (false, None) => return true,
        };
        writeln!(stdout(), "{text}").is_ok()
    }
}

/// An event in a line.
fn text(event: &Event) -> String {
    let (what, about) = match &event.what {
        What::Query(query) => {
            let asked = format!("{} {}", query.name, query.kind);
            let told: Vec<_> = query.addresses.iter().map(ToString::to_string).collect();
            match query.result {
                QueryResult::Answered => {
                    let left_out = query.refusal.as_ref().map(because).unwrap_or_default();
                    ("asked", format!("{asked}: {}{left_out}", told.join(" ")))
                }
                QueryResult::Empty => (
                    "asked",
                    format!("{asked}: no such records{}", or_why(query.refusal.as_ref())),
                ),
                QueryResult::NoName => ("asked", format!("{asked}: no such name")),
                QueryResult::Refused => ("refused", asked + &or_why(query.refusal.as_ref())),
                QueryResult::Failed => {
                    let why = query.failure.as_deref().unwrap_or("no answer");
                    ("failed", format!("{asked}: {why}"))
                }
            }
        }
        What::Packet(packet) => {
            let to = place(packet.name.as_deref(), packet.destination.as_ref());
            let about = format!(
                "{} {to}{}{}",
                packet.protocol,
                by(packet.rule.as_ref()),
                or_why(packet.refusal.as_ref())
            );
            (
                if packet.refusal.is_some() {
                    "refused"
                } else {
                    "new"
                },
                about,
            )
        }
        What::Flow(flow) => {
            let to = place(flow.name.as_deref(), Some(&flow.destination));
            let bytes = match flow.counted {
                true => format!(", {} bytes sent, {} received", flow.sent, flow.received),
                false => String::new(),
            };
            let rule = by(flow.rule.as_ref());
            ("over", format!("{} {to}{bytes}{rule}", flow.protocol))
        }
        What::Proxied(proxied) => {
            let to = Endpoint {
                address: proxied.destination.ip(),
                port: Some(proxied.destination.port()),
            };
            let to = place(proxied.name.as_deref(), Some(&to));
            let failure = proxied.failure.as_ref().map(|why| format!(": {why}"));
            // A refusal says it by itself.
            let rule = proxied.rule.as_ref();
            let rule = rule.filter(|_| proxied.refusal.is_none());
            let about = format!(
                "{} {to}, {} bytes sent, {} received{}{}{}",
                proxied.protocol,
                proxied.sent,
                proxied.received,
                by(rule),
                failure.unwrap_or_default(),
                or_why(proxied.refusal.as_ref())
            );
            (
                if proxied.refusal.is_some() {
                    "refused"
                } else {
                    "proxied"
                },
                about,
            )
        }
        What::Exception(Excepted { exception, allowed }) => (
            if *allowed { "allowed" } else { "denied" },
            format!("exception {exception}"),
        ),
        What::Lost { count } => ("lost", format!("{count} events are missing here")),
    };
    format!("{} {what:<8} {about}", clock(event.at_ms))
}

fn place(name: Option<&str>, to: Option<&Endpoint>) -> String {
    let address = to.map(|to| match to.port {
        Some(port) => std::net::SocketAddr::new(to.address, port).to_string(),
        None => to.address.to_string(),
    });
    let words = name.map(str::to_owned).into_iter().chain(address);
    words.collect::<Vec<_>>().join(" ")
}

/// The rule that let something through, where it is known.
fn by(rule: Option<&String>) -> String {
    rule.map_or(String::new(), |rule| format!(" [{rule}]"))
}

fn because(refusal: &Refusal) -> String {
    format!(" (left out: {})", refusal.cause)
}

/// Cause, code, rule and remedy, where something was refused.
fn or_why(refusal: Option<&Refusal>) -> String {
    refusal.map_or(String::new(), |refusal| {
        let Refusal {
            code,
            cause,
            remedy,
            rule,
        } = refusal;
        format!(": {cause} [{}, {rule}]. {remedy}", code.as_str())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(json: &str) -> String {
        let line = format!(r#"{{"at_ms":0,"machine":"m",{json}}}"#);
        let shown = text(&serde_json::from_str(&line).unwrap());
        let (_time, rest) = shown.split_once(' ').unwrap();
        // The time may have a date before it.
        let at = rest.find(|c: char| c.is_ascii_lowercase()).unwrap();
        rest[at..].to_owned()
    }

    #[test]
    fn the_rule_stands_behind_what_it_let_through() {
        let ends = r#""protocol":"tcp","source":{"address":"198.18.0.2","port":1},"destination":{"address":"10.1.2.3","port":5432}"#;
        let rule = r#""rule":"allow-cidr:10.1.2.3/32:5432""#;
        let bytes = r#""sent":7,"received":9,"counted":true"#;
        for (json, expected) in [
            (
                format!(r#""event":"packet",{ends},{rule}"#),
                "new      tcp 10.1.2.3:5432 [allow-cidr:10.1.2.3/32:5432]",
            ),
            (
                format!(r#""event":"flow",{ends},{rule},{bytes}"#),
                "over     tcp 10.1.2.3:5432, 7 bytes sent, 9 received [allow-cidr:10.1.2.3/32:5432]",
            ),
            // As earlier versions wrote it.
            (
                format!(r#""event":"flow",{ends},{bytes}"#),
                "over     tcp 10.1.2.3:5432, 7 bytes sent, 9 received",
            ),
            (
                r#""event":"exception","exception":"10.1.2.3/32:5432","allowed":false"#.into(),
                "denied   exception 10.1.2.3/32:5432",
            ),
        ] {
            assert_eq!(shown(&json), expected);
        }
    }
}
