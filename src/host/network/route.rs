//! Links, addresses and routes over netlink, in the namespace of the calling
//! thread.

use std::io;
use std::net::IpAddr;

use futures_util::{StreamExt, TryStreamExt};
use netlink_packet_core::{
    DefaultNla, NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REPLACE, NLM_F_REQUEST,
    NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use rtnetlink::packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkInfo, LinkMessage,
};
use rtnetlink::packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope,
};
use rtnetlink::packet_route::tc::{TcAttribute, TcHandle, TcMessage, TcOption};
use rtnetlink::{
    Handle, LinkBridge, LinkMessageBuilder, LinkUnspec, LinkVeth, RouteMessageBuilder,
};

use super::bridge::Device;
use crate::host::nft::{TRIES, restless};
use crate::spec::Cidr;

/// Marks the host's routes to machines: they are ours (rtnetlink(7), rtm_protocol).
const PROTOCOL: RouteProtocol = RouteProtocol::Other(98);

/// Talks to the kernel until `work` is done.
pub(super) fn talk<T>(work: impl AsyncFnOnce(&Handle) -> io::Result<T>) -> io::Result<T> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .build()?;
    runtime.block_on(async {
        let (mut connection, handle, _) = rtnetlink::new_connection()?;
        // For the end of a list may say that it is none.
        connection.set_forward_done(true);
        let connection = tokio::spawn(connection);
        let done = work(&handle).await;
        connection.abort();
        done
    })
}

/// The kernel's errors as the errors they are.
fn told(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}

/// Asks for all there is of a kind. A list that changed while it was told is asked
/// for again, which the crate's own requests do not look at.
async fn dump(handle: &Handle, ask: RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
    let mut handle = handle.clone();
    for _ in 0..TRIES {
        let mut request = NetlinkMessage::from(ask.clone());
        request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
        let mut answers = handle.request(request).map_err(told)?;
        let (mut found, mut interrupted) = (Vec::new(), false);
        while let Some(answer) = answers.next().await {
            interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
            match answer.payload {
                NetlinkPayload::InnerMessage(message) => found.push(message),
                NetlinkPayload::Error(error) => return Err(error.to_io()),
                NetlinkPayload::Done(end) if end.code < 0 => {
                    return Err(io::Error::from_raw_os_error(-end.code));
                }
                _ => {}
            }
        }
        if !interrupted {
            return Ok(found);
        }
    }
    Err(restless())
}

/// A link of this namespace.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Vec<u8>,
    /// What a machine can be put on.
    pub(super) device: Option<Device>,
}

/// The link of this name, if there is one.
pub(super) async fn find(handle: &Handle, name: &str) -> io::Result<Option<Link>> {
    let found = handle
        .link()
        .get()
        .match_name(name)
        .execute()
        .try_next()
        .await;
    match found.map_err(told) {
        Ok(message) => Ok(message.map(|message| link(&message))),
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(None),
        Err(error) => Err(error),
    }
}

fn link(message: &LinkMessage) -> Link {
    let mut link = Link {
        index: message.header.index,
        name: String::new(),
        mac: Vec::new(),
        device: None,
    };
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => link.name.clone_from(name),
            LinkAttribute::Address(mac) => link.mac.clone_from(mac),
            LinkAttribute::LinkInfo(infos) => {
                link.device = infos.iter().find_map(|info| match info {
                    LinkInfo::Kind(InfoKind::Bridge) => Some(Device::Bridge),
                    // A tun, too: only its driver tells them apart.
                    LinkInfo::Kind(InfoKind::Tun) => Some(Device::Tap),
                    _ => None,
                });
            }
            _ => {}
        }
    }
    link
}

/// As [`find`], and it must be there.
pub(super) async fn index(handle: &Handle, name: &str) -> io::Result<u32> {
    let found = find(handle, name).await?;
    found
        .map(|link| link.index)
        .ok_or_else(|| nix::errno::Errno::ENODEV.into())
}

/// One end of a veth.
pub(super) struct End<'n> {
    pub(super) name: &'n str,
    pub(super) mac: [u8; 6],
}

/// Makes a veth, one end here and in a group, the other in another namespace;
/// the first is up.
pub(super) async fn add_veth(
    handle: &Handle,
    here: End<'_>,
    group: u32,
    there: End<'_>,
    netns: std::os::fd::RawFd,
) -> io::Result<()> {
    let peer = LinkMessageBuilder::<LinkUnspec>::new()
        .name(there.name)
        .address(there.mac.into())
        .setns_by_fd(netns)
        .build();
    let message = LinkVeth::new(here.name, there.name)
        .set_info_data(InfoData::Veth(InfoVeth::Peer(peer)))
        .address(here.mac.into())
        .link_group(group)
        .up()
        .build();
    handle.link().add(message).execute().await.map_err(told)
}

/// Makes a bridge of this name; it is up.
pub(super) async fn add_bridge(handle: &Handle, name: &str) -> io::Result<()> {
    let message = LinkBridge::new(name).up().build();
    handle.link().add(message).execute().await.map_err(told)
}

/// Puts a link on a bridge, and up.
pub(super) async fn join_bridge(handle: &Handle, index: u32, bridge: u32) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index)
        .controller(bridge)
        .up()
        .build();
    handle.link().set(message).execute().await.map_err(told)
}

/// Shuts a link, where it is there, and gives it to another group: nothing
/// passes it any more.
pub(super) async fn retire(handle: &Handle, index: u32, group: u32) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index)
        .down()
        .link_group(group)
        .build();
    unless_gone(handle.link().set(message).execute().await)
}

/// All links of a group.
pub(super) async fn in_group(handle: &Handle, group: u32) -> io::Result<Vec<Link>> {
    let ask = RouteNetlinkMessage::GetLink(LinkMessage::default());
    let found = dump(handle, ask).await?;
    let links = found.iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewLink(message) => Some(message),
        _ => None,
    });
    let of_group = LinkAttribute::Group(group);
    let links = links.filter(|message| message.attributes.contains(&of_group));
    Ok(links.map(link).collect())
}

/// Removes a link with everything on it, where it is there.
pub(super) async fn delete(handle: &Handle, index: u32) -> io::Result<()> {
    unless_gone(handle.link().del(index).execute().await)
}

fn unless_gone(done: Result<(), rtnetlink::Error>) -> io::Result<()> {
    match done.map_err(told) {
        Err(error) if error.raw_os_error() == Some(nix::libc::ENODEV) => Ok(()),
        done => done,
    }
}

/// Puts a link up.
pub(super) async fn up(handle: &Handle, index: u32) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index).up().build();
    handle.link().set(message).execute().await.map_err(told)
}

/// Gives a link another hardware address and puts it up.
pub(super) async fn up_as(handle: &Handle, index: u32, mac: [u8; 6]) -> io::Result<()> {
    let message = LinkUnspec::new_with_index(index)
        .address(mac.into())
        .up()
        .build();
    handle.link().set(message).execute().await.map_err(told)
}

/// Gives a link an address.
pub(super) async fn add_address(
    handle: &Handle,
    index: u32,
    address: IpAddr,
    prefix: u8,
) -> io::Result<()> {
    let mut request = handle.address().add(index, address, prefix);
    if address.is_ipv6() {
        // Nobody else is there to have it.
        use rtnetlink::packet_route::address::AddressFlags;
        let flags = AddressAttribute::Flags(AddressFlags::Nodad);
        request.message_mut().attributes.push(flags);
    }
    request.execute().await.map_err(told)
}

/// Says once and for all who has an address.
pub(super) async fn add_neighbour(
    handle: &Handle,
    index: u32,
    address: IpAddr,
    mac: [u8; 6],
) -> io::Result<()> {
    let request = handle.neighbours().add(index, address);
    request
        .link_layer_address(&mac)
        .execute()
        .await
        .map_err(told)
}

/// Sends everything out through a neighbour on this link.
pub(super) async fn add_default(handle: &Handle, index: u32, via: IpAddr) -> io::Result<()> {
    let message = match via {
        IpAddr::V4(via) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .gateway(via)
            .output_interface(index)
            .onlink()
            .build(),
        IpAddr::V6(via) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .gateway(via)
            .output_interface(index)
            .onlink()
            .build(),
    };
    handle.route().add(message).execute().await.map_err(told)
}

/// Sends what is for one address out on this link. Fails with `EEXIST` where
/// that address goes elsewhere.
pub(super) async fn add_host_route(handle: &Handle, index: u32, to: IpAddr) -> io::Result<()> {
    let message = match to {
        IpAddr::V4(to) => RouteMessageBuilder::<std::net::Ipv4Addr>::new()
            .destination_prefix(to, 32)
            .output_interface(index)
            .scope(RouteScope::Link)
            .protocol(PROTOCOL)
            .build(),
        IpAddr::V6(to) => RouteMessageBuilder::<std::net::Ipv6Addr>::new()
            .destination_prefix(to, 128)
            .output_interface(index)
            .protocol(PROTOCOL)
            .build(),
    };
    handle.route().add(message).execute().await.map_err(told)
}

/// A route of this namespace.
#[derive(Debug, Clone, Copy)]
pub(super) struct Route {
    pub(super) to: Cidr,
    pub(super) link: Option<u32>,
    pub(super) ours: bool,
}

/// All routes but default ones.
pub(super) async fn routes(handle: &Handle, v6: bool) -> io::Result<Vec<Route>> {
    let message = match v6 {
        false => RouteMessageBuilder::<std::net::Ipv4Addr>::new().build(),
        true => RouteMessageBuilder::<std::net::Ipv6Addr>::new().build(),
    };
    let found = dump(handle, RouteNetlinkMessage::GetRoute(message)).await?;
    let routes = found.iter().filter_map(|message| match message {
        RouteNetlinkMessage::NewRoute(message) => route(message),
        _ => None,
    });
    Ok(routes.collect())
}

fn route(message: &RouteMessage) -> Option<Route> {
    let mut to = None;
    let mut link = None;
    for attribute in &message.attributes {
        match attribute {
            RouteAttribute::Destination(RouteAddress::Inet(address)) => {
                to = Some(IpAddr::from(*address))
            }
            RouteAttribute::Destination(RouteAddress::Inet6(address)) => {
                to = Some(IpAddr::from(*address))
            }
            RouteAttribute::Oif(index) => link = Some(*index),
            _ => {}
        }
    }
    let to = Cidr::new(to?, message.header.destination_prefix_length).ok()?;
    let ours = message.header.protocol == PROTOCOL;
    Some(Route { to, link, ours })
}

/// The addresses of this namespace, but for those only it itself can reach.
pub(super) async fn addresses(handle: &Handle) -> io::Result<Vec<IpAddr>> {
    let ask = RouteNetlinkMessage::GetAddress(AddressMessage::default());
    let mut addresses = Vec::new();
    for message in dump(handle, ask).await? {
        let RouteNetlinkMessage::NewAddress(message) = message else {
            continue;
        };
        if matches!(
            message.header.scope,
            AddressScope::Host | AddressScope::Link
        ) {
            continue;
        }
        let attributes = &message.attributes;
        let local = attributes.iter().find_map(|one| match one {
            AddressAttribute::Local(address) => Some(*address),
            _ => None,
        });
        let address = attributes.iter().find_map(|one| match one {
            AddressAttribute::Address(address) => Some(*address),
            _ => None,
        });
        addresses.extend(local.or(address));
    }
    Ok(addresses)
}

/// Lets no more out of a link than so many bytes a second (tc-tbf(8)), or, with
/// none, as many as come.
pub(super) async fn shape(handle: &Handle, index: u32, rate: Option<u64>) -> io::Result<()> {
    let mut message = TcMessage::default();
    message.header.index = i32::try_from(index).map_err(io::Error::other)?;
    message.header.parent = TcHandle::ROOT;
    message.header.handle = TcHandle { major: 1, minor: 0 };
    let (kind, flags) = match rate {
        Some(rate) => {
            message.attributes.push(TcAttribute::Kind("tbf".into()));
            message.attributes.push(TcAttribute::Options(tbf(rate)));
            (
                RouteNetlinkMessage::NewQueueDiscipline(message),
                NLM_F_CREATE | NLM_F_REPLACE,
            )
        }
        None => (RouteNetlinkMessage::DelQueueDiscipline(message), 0),
    };
    let mut request = NetlinkMessage::from(kind);
    request.header.flags = NLM_F_REQUEST | NLM_F_ACK | flags;
    let mut handle = handle.clone();
    let mut answers = handle.request(request).map_err(told)?;
    while let Some(answer) = answers.next().await {
        if let NetlinkPayload::Error(error) = answer.payload
            && let Some(code) = error.code
        {
            let error = io::Error::from_raw_os_error(-code.get());
            // None was there.
            return match (rate, error.raw_os_error()) {
                (None, Some(nix::libc::ENOENT | nix::libc::EINVAL)) => Ok(()),
                _ => Err(error),
            };
        }
    }
    Ok(())
}

/// Options of a token bucket: `struct tc_tbf_qopt`, then rate and burst in full
/// (linux/pkt_sched.h).
fn tbf(rate: u64) -> Vec<TcOption> {
    const TCA_TBF_PARMS: u16 = 1;
    const TCA_TBF_RATE64: u16 = 4;
    const TCA_TBF_BURST: u16 = 6;
    const TC_LINKLAYER_ETHERNET: u8 = 1;
    // A hundredth of a second at once, but never less than a few packets; a
    // tenth of a second in the queue.
    let clamp = |bytes: u64, least: u64| u32::try_from(bytes.max(least)).unwrap_or(u32::MAX);
    let burst = clamp(rate / 100, 8 << 10);
    let queue = clamp(rate / 10, 32 << 10);
    let mut parms = Vec::with_capacity(36);
    for rate in [u32::try_from(rate).unwrap_or(u32::MAX), 0] {
        // tc_ratespec: cell_log, linklayer, overhead, cell_align, mpu, rate.
        parms.extend([0, TC_LINKLAYER_ETHERNET, 0, 0, 0, 0, 0, 0]);
        parms.extend(rate.to_ne_bytes());
    }
    parms.extend(queue.to_ne_bytes());
    parms.extend([0; 8]); // buffer and mtu: the burst says it
    let option = |kind, bytes: &[u8]| TcOption::Other(DefaultNla::new(kind, bytes.to_vec()));
    let mut options = vec![
        option(TCA_TBF_PARMS, &parms),
        option(TCA_TBF_BURST, &burst.to_ne_bytes()),
    ];
    if rate > u64::from(u32::MAX) {
        options.push(option(TCA_TBF_RATE64, &rate.to_ne_bytes()));
    }
    options
}
