//! Words of guests, images and files, as they can be shown on a terminal.

use std::fmt::Write as _;

/// Bytes of a name or message as text without control characters, so that it
/// can be shown on a terminal: others become `\n`, `\t`, `\xNN` or `\u{N}`.
pub fn printable(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for chunk in bytes.utf8_chunks() {
        for c in chunk.valid().chars() {
            match c {
                '\n' => text.push_str("\\n"),
                '\t' => text.push_str("\\t"),
                c if c.is_control() || is_bidi_or_invisible(c) => {
                    let _ = write!(text, "\\u{{{:x}}}", u32::from(c));
                }
                c => text.push(c),
            }
        }
        for byte in chunk.invalid() {
            let _ = write!(text, "\\x{byte:02x}");
        }
    }
    text
}

/// Characters that reorder or hide text, which would let a name lie. Those
/// that choose between looks of the one before (emoji have them) do not.
fn is_bidi_or_invisible(c: char) -> bool {
    matches!(c, '\u{2028}' | '\u{2029}' | '\u{fff9}'..='\u{fffb}')
        || is_ignorable(c) && !matches!(c, '\u{fe00}'..='\u{fe0f}')
}

/// Characters without a look of their own (Unicode's Default_Ignorable_Code_Point),
/// which file systems that fold case may leave out when they compare names.
pub(crate) fn is_ignorable(c: char) -> bool {
    matches!(c, '\u{ad}' | '\u{34f}' | '\u{61c}' | '\u{115f}'..='\u{1160}'
        | '\u{17b4}'..='\u{17b5}' | '\u{180b}'..='\u{180f}' | '\u{200b}'..='\u{200f}'
        | '\u{202a}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{3164}'
        | '\u{fe00}'..='\u{fe0f}' | '\u{feff}' | '\u{ffa0}' | '\u{fff0}'..='\u{fff8}'
        | '\u{1bca0}'..='\u{1bca3}' | '\u{1d173}'..='\u{1d17a}' | '\u{e0000}'..='\u{e0fff}')
}

/// Text of several lines, each as [`printable`] shows it but for a tab at its
/// start: nothing of it steers a terminal.
pub(crate) fn visible(text: &str) -> String {
    let lines: Vec<String> = text
        .split('\n')
        .map(|line| match line.strip_prefix('\t') {
            Some(rest) => format!("\t{}", printable(rest.as_bytes())),
            None => printable(line.as_bytes()),
        })
        .collect();
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_characters_are_shown_escaped() {
        assert_eq!(
            printable(b"a\x1b[31m\n\xff\xc3\xa4"),
            "a\\u{1b}[31m\\n\\xffä"
        );
        assert_eq!(printable("x\u{202e}y".as_bytes()), "x\\u{202e}y");
    }

    #[test]
    fn lines_and_their_indentation_stay() {
        let text = "a\u{1b}[2J\n\tb\tc\r\n";
        assert_eq!(visible(text), "a\\u{1b}[2J\n\tb\\tc\\u{d}\n");
    }
}
