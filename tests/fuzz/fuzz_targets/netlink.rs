//! What the kernel tells of packets: their content is the guest's.
#![no_main]

use bulkhead::net::fuzz::netlink;
use bulkhead::net::{Event, Journal, Names, Summary, What};
use bulkhead_fuzz::check_text;

libfuzzer_sys::fuzz_target!(|data: &[u8]| {
    let (journal, mut events) = Journal::new("fuzz", 1 << 16);
    netlink(data, Names::default(), journal);
    let mut summary = Summary::default();
    while let Ok(event) = events.try_recv() {
        let json = serde_json::to_string(&event).expect("an event is JSON");
        check_text(&json);
        let again: Event = serde_json::from_str(&json).expect("and is read again");
        assert_eq!(again, event);
        if let What::Packet(packet) = &event.what
            && let Some(refusal) = &packet.refusal
        {
            check_text(&refusal.rule);
        }
        summary.take(&event);
    }
    check_text(&summary.line());
});
