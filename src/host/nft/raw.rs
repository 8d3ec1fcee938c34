//! What the crate nftnl has no type for: any expression by its attributes,
//! objects, and the elements of sets.
#![allow(unsafe_code)] // libnftnl is a C library; each call says why it is sound

use std::ffi::{CStr, CString, c_void};
use std::ptr::NonNull;

use nftnl::expr::Expression;
use nftnl::nftnl_sys::{self as sys, libc};
use nftnl::{MsgType, NlMsg, ProtoFamily, Rule, Table};

/// The value of an attribute. Its type must be the one libnftnl has for it, or
/// libnftnl ends the program.
#[derive(Debug)]
pub(super) enum Value {
    U8(u8),
    U16(u16),
    U32(u32),
    U64(u64),
    Bytes(Vec<u8>),
    Text(CString),
}

/// An expression: its name and attributes (libnftnl/expr.h).
#[derive(Debug)]
pub(super) struct Raw {
    pub(super) name: &'static CStr,
    pub(super) attributes: Vec<(u32, Value)>,
}

impl Raw {
    pub(super) fn new<const N: usize>(name: &'static CStr, attributes: [(u32, Value); N]) -> Self {
        let attributes = attributes.into();
        Self { name, attributes }
    }
}

/// What libnftnl allocated. It returns null only when there is no memory left,
/// where Rust's own allocations end the program, too.
fn allocated<T>(pointer: *mut T) -> NonNull<T> {
    NonNull::new(pointer).unwrap_or_else(|| std::process::abort())
}

impl Expression for Raw {
    fn to_expr(&self, _: &Rule) -> NonNull<sys::nftnl_expr> {
        // SAFETY: the name is a C string and the library copies what it is
        // given: values, and bytes of the length told.
        unsafe {
            let expr = allocated(sys::nftnl_expr_alloc(self.name.as_ptr()));
            for (attribute, value) in &self.attributes {
                let (to, attribute) = (expr.as_ptr(), *attribute as u16);
                match value {
                    Value::U8(value) => sys::nftnl_expr_set_u8(to, attribute, *value),
                    Value::U16(value) => sys::nftnl_expr_set_u16(to, attribute, *value),
                    Value::U32(value) => sys::nftnl_expr_set_u32(to, attribute, *value),
                    Value::U64(value) => sys::nftnl_expr_set_u64(to, attribute, *value),
                    Value::Text(text) => {
                        sys::nftnl_expr_set_str(to, attribute, text.as_ptr());
                    }
                    Value::Bytes(bytes) => {
                        let data = bytes.as_ptr().cast::<c_void>();
                        sys::nftnl_expr_set(to, attribute, data, bytes.len() as u32);
                    }
                }
            }
            expr
        }
    }
}

/// Sets what the crate's own sets lack.
pub(super) fn set_attribute<K>(set: &nftnl::set::Set<'_, K>, attribute: u32, value: u32) {
    // SAFETY: the set lives as long as the reference; the value is copied.
    unsafe { sys::nftnl_set_set_u32(set.as_ptr().as_ptr(), attribute as u16, value) }
}

/// One element of a set.
#[derive(Debug, Default)]
pub(super) struct Element {
    /// Its key, in network order.
    pub(super) key: Vec<u8>,
    /// It ends an interval.
    pub(super) end: bool,
    /// In a map to verdicts: the chain to go to.
    pub(super) chain: Option<CString>,
    /// How long it stays, in milliseconds.
    pub(super) timeout_ms: Option<u64>,
}

/// Puts an element into a set that is sent afterwards with [`Elements`].
pub(super) fn add_element<K>(set: &nftnl::set::Set<'_, K>, element: &Element) {
    // SAFETY: the library copies the key and the chain's name; the element is
    // the set's from `nftnl_set_elem_add` on.
    unsafe {
        let to = allocated(sys::nftnl_set_elem_alloc()).as_ptr();
        let key = element.key.as_ptr().cast::<c_void>();
        sys::nftnl_set_elem_set(
            to,
            sys::NFTNL_SET_ELEM_KEY as u16,
            key,
            element.key.len() as u32,
        );
        if element.end {
            let flag = libc::NFT_SET_ELEM_INTERVAL_END as u32;
            sys::nftnl_set_elem_set_u32(to, sys::NFTNL_SET_ELEM_FLAGS as u16, flag);
        }
        if let Some(chain) = &element.chain {
            let verdict = libc::NFT_GOTO as u32;
            sys::nftnl_set_elem_set_u32(to, sys::NFTNL_SET_ELEM_VERDICT as u16, verdict);
            sys::nftnl_set_elem_set_str(to, sys::NFTNL_SET_ELEM_CHAIN as u16, chain.as_ptr());
        }
        if let Some(timeout) = element.timeout_ms {
            sys::nftnl_set_elem_set_u64(to, sys::NFTNL_SET_ELEM_TIMEOUT as u16, timeout);
        }
        sys::nftnl_set_elem_add(set.as_ptr().as_ptr(), to);
    }
}

/// The elements of a set, as one message: fine for some hundred. One that is
/// there already is not an error.
pub(super) struct Elements<'s, 't, K>(pub(super) &'s nftnl::set::Set<'t, K>);

// SAFETY: writes one message no longer than the buffer: ours are a few hundred
// elements of some ten bytes, libnftnl's buffer takes 64 KiB.
unsafe impl<K> NlMsg for Elements<'_, '_, K> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        let (message, flags) = match kind {
            MsgType::Add => (libc::NFT_MSG_NEWSETELEM, libc::NLM_F_CREATE),
            MsgType::Del => (libc::NFT_MSG_DELSETELEM, 0),
        };
        // SAFETY: as above.
        unsafe {
            let header = header(buffer, message, self.0.get_family(), flags, seq);
            sys::nftnl_set_elems_nlmsg_build_payload(header, self.0.as_ptr().as_ptr());
        }
    }
}

/// Empties a set: a message that names it and no element.
pub(super) struct Emptied<'s, 't, K>(pub(super) &'s nftnl::set::Set<'t, K>);

// SAFETY: one short message.
unsafe impl<K> NlMsg for Emptied<'_, '_, K> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        // SAFETY: as above; the set has no elements.
        unsafe {
            let header = header(
                buffer,
                libc::NFT_MSG_DELSETELEM,
                self.0.get_family(),
                0,
                seq,
            );
            sys::nftnl_set_elems_nlmsg_build_payload(header, self.0.as_ptr().as_ptr());
        }
    }
}

/// A named counter.
pub(super) struct Counter<'t> {
    pub(super) table: &'t Table,
    pub(super) name: CString,
}

// SAFETY: one short message.
unsafe impl NlMsg for Counter<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        let (message, flags) = match kind {
            MsgType::Add => (libc::NFT_MSG_NEWOBJ, libc::NLM_F_CREATE),
            MsgType::Del => (libc::NFT_MSG_DELOBJ, 0),
        };
        // SAFETY: the names are C strings that the library copies; the object
        // is freed once.
        unsafe {
            let object = allocated(sys::nftnl_obj_alloc()).as_ptr();
            sys::nftnl_obj_set_u32(object, sys::NFTNL_OBJ_TYPE as u16, NFT_OBJECT_COUNTER);
            let table = self.table.get_name().as_ptr();
            sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_TABLE as u16, table);
            sys::nftnl_obj_set_str(object, sys::NFTNL_OBJ_NAME as u16, self.name.as_ptr());
            let header = header(buffer, message, self.table.get_family(), flags, seq);
            sys::nftnl_obj_nlmsg_build_payload(header, object);
            sys::nftnl_obj_free(object);
        }
    }
}

/// linux/netfilter/nf_tables.h.
pub(super) const NFT_OBJECT_COUNTER: u32 = 1;

/// Takes all rules out of a chain.
pub(super) struct NoRules<'c, 't>(pub(super) &'c nftnl::Chain<'t>);

// SAFETY: one short message.
unsafe impl NlMsg for NoRules<'_, '_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, _: MsgType) {
        // The crate's own message names the rule's chain and, with nothing
        // else in it, means all of them.
        let rule = Rule::new(self.0);
        // SAFETY: the buffer is the caller's.
        unsafe { rule.write(buffer, seq, MsgType::Del) }
    }
}

/// Removes a table only if nothing is left in it.
pub(super) struct EmptyTable<'t>(pub(super) &'t Table);

// SAFETY: one short message.
unsafe impl NlMsg for EmptyTable<'_> {
    unsafe fn write(&self, buffer: *mut c_void, seq: u32, kind: MsgType) {
        // SAFETY: the crate writes a header first, whose flags are added to.
        unsafe {
            self.0.write(buffer, seq, kind);
            let header = buffer.cast::<libc::nlmsghdr>();
            (*header).nlmsg_flags |= NLM_F_NONREC;
        }
    }
}

/// linux/netlink.h: not what is in it.
const NLM_F_NONREC: u16 = 0x100;

/// Room for one message, however long.
pub(super) fn buffer() -> Vec<u64> {
    vec![0; (nftnl::nft_nlmsg_maxsize() as usize).div_ceil(8)]
}

/// A message as the kernel would get it.
pub(super) fn written(message: &dyn NlMsg, kind: MsgType, buffer: &mut [u64]) -> Vec<u8> {
    let most = size_of_val(buffer);
    // SAFETY: the buffer is [`buffer`]'s, as long as libnftnl's longest message,
    // and aligned; what is written begins with a header that says its length.
    unsafe {
        message.write(buffer.as_mut_ptr().cast(), 0, kind);
        let header = buffer.as_ptr().cast::<libc::nlmsghdr>();
        let length = ((*header).nlmsg_len as usize).min(most);
        std::slice::from_raw_parts(buffer.as_ptr().cast::<u8>(), length).to_vec()
    }
}

/// Begins a message.
///
/// # Safety
/// The buffer has room for it.
unsafe fn header(
    buffer: *mut c_void,
    message: i32,
    family: ProtoFamily,
    flags: i32,
    seq: u32,
) -> *mut libc::nlmsghdr {
    let flags = (flags | libc::NLM_F_ACK) as u16;
    // SAFETY: the caller's.
    unsafe { sys::nftnl_nlmsg_build_hdr(buffer.cast(), message as u16, family as u16, flags, seq) }
}
