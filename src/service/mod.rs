//! What serves many callers on top of single machines.

pub mod pool;

/// The example of docs/pool.md, which has to compile.
#[cfg(doctest)]
#[doc = include_str!("../../docs/pool.md")]
struct Guide;
