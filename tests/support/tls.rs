//! The first bytes of a TLS connection, made by hand.

/// A handshake that names a host, in one message.
pub(crate) fn hello(sni: Option<&str>, more: &[(u16, &[u8])]) -> Vec<u8> {
    let mut extensions = Vec::new();
    let mut add = |kind: u16, data: &[u8]| {
        extensions.extend(kind.to_be_bytes());
        extensions.extend(length(data.len()));
        extensions.extend(data);
    };
    if let Some(name) = sni {
        let entry = [&[0][..], &length(name.len()), name.as_bytes()].concat();
        add(0, &[&length(entry.len())[..], &entry].concat());
    }
    more.iter().for_each(|(kind, data)| add(*kind, data));
    let mut body = vec![3, 3];
    body.extend([7; 32]);
    body.extend([0, 0, 2, 0x13, 1, 1, 0]);
    body.extend(length(extensions.len()));
    body.extend(extensions);
    let size = u32::try_from(body.len()).unwrap().to_be_bytes();
    [&[1][..], &size[1..], &body].concat()
}

/// A message as records of at most `each` bytes.
pub(crate) fn records(message: &[u8], each: usize) -> Vec<u8> {
    let record = |part: &[u8]| [&[22, 3, 1][..], &length(part.len()), part].concat();
    message.chunks(each).flat_map(record).collect()
}

fn length(length: usize) -> [u8; 2] {
    u16::try_from(length).unwrap().to_be_bytes()
}
