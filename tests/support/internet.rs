//! An internet with hosts and a name server, for machines that go by names.
#![allow(dead_code)] // each test file uses a part of it

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use bulkhead::host::network::Site;
use hickory_proto::rr::RecordType;

use super::dns::{self, Says, Upstream, a, cname};
use super::support::Bulkhead;
use super::support::net::{World, sh_in};

pub(crate) const RESOLVER: &str = "8.8.8.8:53";
/// Hosts of the internet that is made here: names, and where they are.
pub(crate) const GOOD: &str = "93.184.215.14";
pub(crate) const EVIL: &str = "93.184.215.15";
/// Two names are here: shared.org and other.org.
pub(crate) const SHARED: &str = "93.184.215.16";

/// An internet with hosts and a name server.
pub(crate) struct Internet {
    pub(crate) world: World,
    pub(crate) dns: Upstream,
}

impl Internet {
    pub(crate) fn new() -> Self {
        let world = World::new();
        let netns = &world.internet.netns;
        for address in [GOOD, EVIL, SHARED] {
            sh_in(netns, &format!("ip addr add {address}/32 dev lo"));
            for port in [22, 80, 443, 8443] {
                let address = format!("{address}:{port}");
                serve(
                    netns
                        .run_in(|| TcpListener::bind(address))
                        .unwrap()
                        .unwrap(),
                );
            }
        }
        let sockets = netns.run_in(|| dns::sockets(RESOLVER)).unwrap();
        let dns = Upstream::on(sockets, |name, kind, _| match (name, kind) {
            ("good.org", RecordType::A) => Says::Records(vec![a(name, GOOD, 60)]),
            ("alias.org", RecordType::A) => {
                Says::Records(vec![cname(name, "cdn.net"), a("cdn.net", GOOD, 60)])
            }
            ("six.org", RecordType::AAAA) => Says::Records(vec![a(name, "2a00:1234::1", 60)]),
            ("evil.org", RecordType::A) => Says::Records(vec![a(name, EVIL, 60)]),
            ("shared.org" | "other.org", RecordType::A) => Says::Records(vec![a(name, SHARED, 60)]),
            ("rebind.org", RecordType::A) => Says::Records(vec![a(name, "169.254.169.254", 0)]),
            ("lan.org", RecordType::A) => {
                Says::Records(vec![a(name, "10.77.0.9", 0), a(name, GOOD, 60)])
            }
            _ => Says::Records(vec![]),
        });
        Self { world, dns }
    }

    pub(crate) fn site(&self) -> Site {
        Site {
            resolvers: vec![RESOLVER.parse().unwrap()],
            ..self.world.site()
        }
    }

    pub(crate) fn bulkhead(&self) -> Bulkhead {
        Bulkhead::new()
            .with_own_state()
            .inside(&self.world.host.path, RESOLVER)
    }
}

/// Answers each request with the address it came to.
pub(crate) fn serve(listener: TcpListener) {
    thread::spawn(move || {
        for mut stream in listener.incoming().flatten() {
            thread::spawn(move || {
                let own = stream.local_addr().unwrap().ip();
                let body = format!("I am {own}\n");
                let head = format!(
                    "HTTP/1.1 200 OK\r\nLocation: http://169.254.169.254/latest/\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                    body.len()
                );
                let mut request = [0; 4096];
                let _ = stream.read(&mut request);
                let _ = stream.write_all(format!("{head}{body}").as_bytes());
            });
        }
    });
}
