//! Named counters, read back.
#![allow(unsafe_code)] // libnftnl is a C library; each call says why it is sound

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::io;

use nftnl::nftnl_sys::{self as sys, libc};

use super::raw::NFT_OBJECT_COUNTER;
use super::{connect, dump};
use crate::plan::firewall::{Family, TABLE};

/// What a counter has counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, serde::Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Counted {
    /// Packets.
    pub packets: u64,
    /// Their bytes.
    pub bytes: u64,
}

/// The counters of our table of this family, by name; empty where there is no
/// such table.
///
/// # Errors
/// The kernel does not answer.
pub fn counters(family: Family) -> io::Result<BTreeMap<String, Counted>> {
    counters_of(family, TABLE)
}

/// As [`counters`], of the table of this name.
///
/// # Errors
/// The kernel does not answer.
pub fn counters_of(family: Family, table: &str) -> io::Result<BTreeMap<String, Counted>> {
    let family = match family {
        Family::Inet => libc::NFPROTO_INET,
        Family::Netdev => libc::NFPROTO_NETDEV,
    };
    let mut request = vec![0u8; nftnl::nft_nlmsg_maxsize() as usize];
    // SAFETY: the buffer is as long as libnftnl's longest message; what it
    // writes is one header.
    let length = unsafe {
        let header = sys::nftnl_nlmsg_build_hdr(
            request.as_mut_ptr().cast(),
            libc::NFT_MSG_GETOBJ as u16,
            family as u16,
            libc::NLM_F_DUMP as u16,
            1,
        );
        (*header).nlmsg_len as usize
    };
    let messages = dump(&connect()?, &request[..length])?;
    let found = messages
        .iter()
        .filter_map(|message| counter(message, table));
    Ok(found.collect())
}

/// The counter in a message, if it is one of this table.
fn counter(message: &[u8], table: &str) -> Option<(String, Counted)> {
    // In memory of its own: aligned, as the library reads it.
    let mut aligned = vec![0u64; message.len().div_ceil(8)];
    // SAFETY: the message is whole: its header's length is that of `message`,
    // and the copy has room for it. The object is freed once, after the last
    // use of what it lends.
    unsafe {
        let to = aligned.as_mut_ptr().cast::<u8>();
        std::ptr::copy_nonoverlapping(message.as_ptr(), to, message.len());
        let object = sys::nftnl_obj_alloc();
        if object.is_null() {
            return None;
        }
        let found = (sys::nftnl_obj_nlmsg_parse(to.cast(), object) == 0)
            .then(|| read(object, table))
            .flatten();
        sys::nftnl_obj_free(object);
        found
    }
}

/// # Safety
/// The object is one.
unsafe fn read(object: *mut sys::nftnl_obj, table: &str) -> Option<(String, Counted)> {
    // SAFETY: the library gives null for what is absent, and C strings.
    unsafe {
        if sys::nftnl_obj_get_u32(object, sys::NFTNL_OBJ_TYPE as u16) != NFT_OBJECT_COUNTER {
            return None;
        }
        let text = |attribute: u32| {
            let pointer = sys::nftnl_obj_get_str(object, attribute as u16);
            (!pointer.is_null()).then(|| CStr::from_ptr(pointer).to_string_lossy().into_owned())
        };
        if text(sys::NFTNL_OBJ_TABLE)? != table {
            return None;
        }
        let counted = Counted {
            packets: sys::nftnl_obj_get_u64(object, sys::NFTNL_OBJ_CTR_PKTS as u16),
            bytes: sys::nftnl_obj_get_u64(object, sys::NFTNL_OBJ_CTR_BYTES as u16),
        };
        Some((text(sys::NFTNL_OBJ_NAME)?, counted))
    }
}
