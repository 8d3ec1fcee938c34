//! Frames, in which all messages travel.

/// Length of an encoded [`Header`], in bytes.
pub const HEADER_LEN: usize = 12;
/// Largest payload of one frame, in bytes.
pub const MAX_PAYLOAD: usize = 64 * 1024;

/// What a frame is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// JSON [`Hello`](crate::Hello), stream 0, both directions.
    Hello = 0,
    /// JSON [`Request`](crate::Request), host to guest: opens the stream.
    Open = 1,
    /// JSON [`Reply`](crate::Reply), guest to host: the first frame on a stream.
    Reply = 2,
    /// Bytes from host to guest.
    In = 3,
    /// Bytes from guest to host: stdout, or the main data of a transfer.
    Out = 4,
    /// Bytes from guest to host: stderr, or the side data of a transfer.
    Err = 5,
    /// Empty, host to guest: no more `In` will come.
    End = 6,
    /// Little-endian `u32`: so many bytes were consumed by the receiver.
    Credit = 7,
    /// JSON [`Control`](crate::Control), host to guest, for a running stream.
    Control = 8,
    /// JSON [`Exit`](crate::Exit), guest to host: the last frame of a stream.
    Exit = 9,
}

impl TryFrom<u8> for Kind {
    type Error = FrameError;
    fn try_from(value: u8) -> Result<Self, FrameError> {
        Ok(match value {
            0 => Self::Hello,
            1 => Self::Open,
            2 => Self::Reply,
            3 => Self::In,
            4 => Self::Out,
            5 => Self::Err,
            6 => Self::End,
            7 => Self::Credit,
            8 => Self::Control,
            9 => Self::Exit,
            other => return Err(FrameError::Kind(other)),
        })
    }
}

/// Start of every frame: payload length (`u32`), stream (`u32`), kind (`u8`),
/// three zero bytes; integers are little-endian.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header {
    /// Payload bytes that follow, at most [`MAX_PAYLOAD`].
    pub len: u32,
    /// Stream number; 0 only for `Hello`.
    pub stream: u32,
    /// What the payload is.
    pub kind: Kind,
}

impl Header {
    /// The header as it goes over the wire.
    pub fn encode(self) -> [u8; HEADER_LEN] {
        let mut bytes = [0; HEADER_LEN];
        bytes[..4].copy_from_slice(&self.len.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.stream.to_le_bytes());
        bytes[8] = self.kind as u8;
        bytes
    }

    /// Reads a header back.
    ///
    /// # Errors
    /// A length over [`MAX_PAYLOAD`], an unknown kind, non-zero padding, or a
    /// stream number that does not fit the kind.
    pub fn decode(bytes: [u8; HEADER_LEN]) -> Result<Self, FrameError> {
        let [l0, l1, l2, l3, s0, s1, s2, s3, kind, pad @ ..] = bytes;
        let len = u32::from_le_bytes([l0, l1, l2, l3]);
        let stream = u32::from_le_bytes([s0, s1, s2, s3]);
        let kind = Kind::try_from(kind)?;
        if len as usize > MAX_PAYLOAD {
            return Err(FrameError::Length(len));
        }
        if pad != [0; 3] {
            return Err(FrameError::Padding);
        }
        if (stream == 0) != (kind == Kind::Hello) {
            return Err(FrameError::Stream { stream, kind });
        }
        Ok(Self { len, stream, kind })
    }
}

/// A frame that breaks the rules of this module.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrameError {
    /// Payload length over [`MAX_PAYLOAD`].
    Length(u32),
    /// A kind this version does not know.
    Kind(u8),
    /// The reserved bytes are not zero: the two ends have lost step.
    Padding,
    /// Stream 0 used for something other than `Hello`, or the reverse.
    Stream {
        /// The stream number seen.
        stream: u32,
        /// The kind it came with.
        kind: Kind,
    },
}

impl std::fmt::Display for FrameError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Length(len) => write!(f, "frame of {len} bytes, {MAX_PAYLOAD} allowed"),
            Self::Kind(kind) => write!(f, "unknown frame kind {kind}"),
            Self::Padding => write!(f, "frame header with non-zero padding"),
            Self::Stream { stream, kind } => write!(f, "{kind:?} frame on stream {stream}"),
        }
    }
}

impl std::error::Error for FrameError {}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn headers_survive_the_wire(
            len in 0..=MAX_PAYLOAD as u32,
            stream in 1..=u32::MAX,
            kind in 0..=9_u8,
        ) {
            let kind = Kind::try_from(kind).unwrap();
            let stream = if kind == Kind::Hello { 0 } else { stream };
            let header = Header { len, stream, kind };
            prop_assert_eq!(Header::decode(header.encode()), Ok(header));
        }

        /// There is one way to write each header, and all bytes count.
        #[test]
        fn what_is_taken_for_a_header_is_one(
            len in prop_oneof![any::<u32>(), 0..100_000_u32],
            stream in prop_oneof![any::<u32>(), 0..2_u32],
            kind in 0..12_u8,
            pad in prop_oneof![Just([0; 3]), any::<[u8; 3]>()],
        ) {
            let mut bytes = [0; HEADER_LEN];
            bytes[..4].copy_from_slice(&len.to_le_bytes());
            bytes[4..8].copy_from_slice(&stream.to_le_bytes());
            bytes[8] = kind;
            bytes[9..].copy_from_slice(&pad);
            match Header::decode(bytes) {
                Ok(header) => {
                    prop_assert!(header.len as usize <= MAX_PAYLOAD);
                    prop_assert_eq!(header.encode(), bytes);
                }
                Err(_) => prop_assert!(
                    len as usize > MAX_PAYLOAD || kind > 9 || pad != [0; 3]
                        || (stream == 0) != (kind == 0)
                ),
            }
        }
    }

    #[test]
    fn bad_headers_are_refused() {
        let good = Header {
            len: 1,
            stream: 1,
            kind: Kind::Out,
        }
        .encode();
        let with = |at: usize, value: u8| {
            let mut bytes = good;
            bytes[at] = value;
            Header::decode(bytes)
        };
        assert_eq!(with(3, 1), Err(FrameError::Length(0x0100_0001)));
        assert_eq!(with(8, 10), Err(FrameError::Kind(10)));
        assert_eq!(with(11, 1), Err(FrameError::Padding));
        assert_eq!(
            with(4, 0),
            Err(FrameError::Stream {
                stream: 0,
                kind: Kind::Out
            })
        );
        assert_eq!(
            with(8, 0),
            Err(FrameError::Stream {
                stream: 1,
                kind: Kind::Hello
            })
        );
    }
}
