//! The listing of snapshots, as `qemu-img snapshot -l` prints it, and as JSON.

use jiff::tz::TimeZone;
use jiff::Timestamp;
use qcow2_snapshot::Snapshot;

/// What QEMU stores where there is no instruction count.
const NO_ICOUNT: u64 = u64::MAX;

/// The table; nothing without snapshots. `terminal`: nothing in a name may reach it as a command.
pub(crate) fn table(snapshots: &[Snapshot], terminal: bool) -> Vec<u8> {
    let mut out = Vec::new();
    if snapshots.is_empty() {
        return out;
    }
    let zone = TimeZone::system();
    out.extend_from_slice(b"Snapshot list:\n");
    row(
        &mut out,
        b"ID",
        b"TAG",
        ["VM_SIZE", "DATE", "VM_CLOCK", "ICOUNT"].map(str::to_owned),
    );
    for s in snapshots {
        let icount = match s.icount {
            NO_ICOUNT => "--".to_owned(),
            n => (n as i64).to_string(),
        };
        let cells = [
            size(s.vm_state_size),
            date(s.date_sec, &zone),
            clock(s.vm_clock_nsec),
            icount,
        ];
        match terminal {
            true => row(&mut out, &visible(&s.id), &visible(&s.name), cells),
            false => row(&mut out, &s.id, &s.name, cells),
        }
    }
    out
}

/// A name for people: what a terminal would act on is written as `ls -b` writes it.
pub(crate) fn visible(name: &[u8]) -> Vec<u8> {
    let mut out = String::new();
    for chunk in name.utf8_chunks() {
        for c in chunk.valid().chars() {
            // Line separators and what turns the direction of writing are no controls by name.
            let acts = matches!(c, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}');
            match c {
                '\n' => out.push_str("\\n"),
                '\t' => out.push_str("\\t"),
                c if c.is_control() || acts => {
                    let mut bytes = [0; 4];
                    octal(&mut out, c.encode_utf8(&mut bytes).as_bytes());
                }
                c => out.push(c),
            }
        }
        octal(&mut out, chunk.invalid());
    }
    out.into_bytes()
}

fn octal(out: &mut String, bytes: &[u8]) {
    for b in bytes {
        out.push_str(&format!("\\{b:03o}"));
    }
}

/// C's `%-7s %-16s %8s %19s %15s %10s`: widths in bytes, and nothing is cut.
fn row(out: &mut Vec<u8>, id: &[u8], name: &[u8], cells: [String; 4]) {
    for (text, width) in [(id, 7usize), (name, 16)] {
        out.extend_from_slice(text);
        out.resize(out.len() + width.saturating_sub(text.len()), b' ');
        out.push(b' ');
    }
    let [size, date, clock, icount] = cells;
    out.extend_from_slice(format!("{size:>8} {date:>19} {clock:>15} {icount:>10}\n").as_bytes());
}

fn date(seconds: u32, zone: &TimeZone) -> String {
    match Timestamp::from_second(i64::from(seconds)) {
        Ok(t) => t
            .to_zoned(zone.clone())
            .strftime("%Y-%m-%d %H:%M:%S")
            .to_string(),
        // No number of 32 bits gets here.
        Err(_) => String::new(),
    }
}

fn clock(nanoseconds: u64) -> String {
    let seconds = nanoseconds / 1_000_000_000;
    format!(
        "{:04}:{:02}:{:02}.{:03}",
        seconds / 3600,
        seconds / 60 % 60,
        seconds % 60,
        nanoseconds / 1_000_000 % 1000
    )
}

/// QEMU's `size_to_str`: the unit changes at 1000 of it, not at 1024.
pub(crate) fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["", "Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
    // The exponent that C's frexp() gives: its fraction is at least a half.
    let scaled = bytes as f64 / (1000.0 / 1024.0);
    let exponent = (scaled.to_bits() >> 52 & 0x7ff).saturating_sub(1022);
    let step = exponent.saturating_sub(1) / 10;
    let value = bytes as f64 / (1u64 << (10 * step)) as f64;
    let unit = UNITS.get(step as usize).copied().unwrap_or_default();
    format!("{} {unit}B", three_digits(value))
}

/// C's `%0.3g`, for numbers that are not negative.
fn three_digits(value: f64) -> String {
    let text = format!("{value:.2e}");
    let (mantissa, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    let fixed = (-4..3).contains(&exponent);
    let text = if fixed {
        format!("{value:.*}", (2 - exponent) as usize)
    } else {
        mantissa.to_owned()
    };
    let short = match text.contains('.') {
        true => text.trim_end_matches('0').trim_end_matches('.'),
        false => &text,
    };
    if fixed {
        short.to_owned()
    } else {
        format!("{short}e{exponent:+03}")
    }
}

/// An array with the fields that `qemu-img info --output=json` has under "snapshots".
pub(crate) fn json(snapshots: &[Snapshot]) -> String {
    let items: Vec<String> = snapshots.iter().map(|s| object(&fields(s))).collect();
    array(&items)
}

/// What QEMU says of a snapshot.
pub(crate) fn fields(s: &Snapshot) -> Vec<String> {
    let mut fields = Vec::new();
    if s.icount != NO_ICOUNT {
        fields.push(format!("\"icount\": {}", s.icount as i64));
    }
    fields.extend([
        format!("\"vm-clock-nsec\": {}", s.vm_clock_nsec % 1_000_000_000),
        format!("\"name\": {}", quoted(&s.name)),
        format!("\"date-sec\": {}", s.date_sec),
        format!("\"date-nsec\": {}", s.date_nsec),
        format!("\"vm-clock-sec\": {}", s.vm_clock_nsec / 1_000_000_000),
        format!("\"id\": {}", quoted(&s.id)),
        format!("\"vm-state-size\": {}", s.vm_state_size as i64),
    ]);
    fields
}

/// A JSON object of an array.
pub(crate) fn object(fields: &[String]) -> String {
    format!("    {{\n        {}\n    }}", fields.join(",\n        "))
}

/// A JSON array of such objects.
pub(crate) fn array(items: &[String]) -> String {
    if items.is_empty() {
        return "[\n]\n".to_owned();
    }
    format!("[\n{}\n]\n", items.join(",\n"))
}

/// A JSON string in ASCII, as QEMU writes it.
pub(crate) fn quoted(text: &[u8]) -> String {
    let mut out = String::from('"');
    let mut rest = text;
    while !rest.is_empty() {
        let (c, n) = first_letter(rest);
        rest = rest.get(n..).unwrap_or_default();
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\u{8}' => out.push_str("\\b"),
            '\u{c}' => out.push_str("\\f"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            ' '..='~' => out.push(c),
            other => {
                let mut units = [0; 2];
                for unit in other.encode_utf16(&mut units) {
                    out.push_str(&format!("\\u{unit:04X}"));
                }
            }
        }
    }
    out.push('"');
    out
}

/// The first letter of a text, and its length in bytes. What is no letter is U+FFFD, once for as many
/// bytes as QEMU takes together: a first byte, of the old forms of up to six bytes too, with
/// the following ones that it announces, as far as they are there. Noncharacters are no
/// letters either, and NUL has a form of two bytes.
fn first_letter(text: &[u8]) -> (char, usize) {
    const NONE: char = char::REPLACEMENT_CHARACTER;
    let first = text.first().copied().unwrap_or_default();
    let announced = match first.leading_ones() {
        0 => return (first.into(), 1),
        n @ 2..=6 => n as usize,
        _ => return (NONE, 1),
    };
    let mut code = u32::from(first & (0x7f >> announced));
    let follow = text.get(1..).unwrap_or_default().iter();
    let follow = follow.take_while(|b| **b & 0xc0 == 0x80);
    let mut n = 1;
    for b in follow.take(announced - 1) {
        code = code << 6 | u32::from(b & 0x3f);
        n += 1;
    }
    let letter = char::from_u32(code).filter(|c| match c {
        _ if n < announced => false,
        '\0' => n == 2,
        '\u{fdd0}'..='\u{fdef}' => false,
        c => c.len_utf8() == n && code & 0xfffe != 0xfffe,
    });
    (letter.unwrap_or(NONE), n)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_those_of_c() {
        // By a C program with QEMU's formula.
        let cases = [
            (0, "0 B"),
            (1, "1 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1023, "0.999 KiB"),
            (1024, "1 KiB"),
            (1025, "1 KiB"),
            (1034, "1.01 KiB"),
            (10_240, "10 KiB"),
            (102_400, "100 KiB"),
            (1_023_488, "1e+03 KiB"),
            (1_024_000, "0.977 MiB"),
            (1 << 20, "1 MiB"),
            (123_456_789, "118 MiB"),
            (1 << 40, "1 TiB"),
            (1 << 63, "8 EiB"),
            (u64::MAX, "16 EiB"),
        ];
        for (bytes, text) in cases {
            assert_eq!(size(bytes), text, "{bytes}");
        }
    }

    #[test]
    fn json_strings_are_ascii() {
        assert_eq!(
            quoted("a\"\\\n\u{1}ß\u{1F600}".as_bytes()),
            r#""a\"\\\n\u0001\u00DF\uD83D\uDE00""#
        );
    }
}
