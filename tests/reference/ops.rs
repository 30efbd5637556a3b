//! The files and the lines of a folder of `c-tests/images` (`c-tests/cases.c` reads the same).

use qcow2_snapshot::NewSnapshot;
use std::io::Read as _;
use std::path::Path;

pub fn unpacked(path: &Path) -> Vec<u8> {
    let file = std::fs::File::open(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    let mut bytes = Vec::new();
    flate2::read::GzDecoder::new(file)
        .read_to_end(&mut bytes)
        .unwrap();
    bytes
}

/// A name: `%XX` is a byte, `""` is empty.
pub fn name(word: &str) -> Vec<u8> {
    let mut rest = if word == "\"\"" { "" } else { word }.bytes();
    let mut out = Vec::new();
    while let Some(byte) = rest.next() {
        out.push(match byte {
            b'%' => {
                let digits = [rest.next().unwrap(), rest.next().unwrap()];
                u8::from_str_radix(std::str::from_utf8(&digits).unwrap(), 16).unwrap()
            }
            byte => byte,
        });
    }
    out
}

/// What stands behind `create`.
pub fn new_snapshot(words: &[&str]) -> NewSnapshot {
    let mut new = NewSnapshot {
        name: name(words[0]),
        date_sec: words[1].parse().unwrap(),
        date_nsec: words[2].parse().unwrap(),
        ..NewSnapshot::default()
    };
    for field in &words[3..] {
        let (key, value) = field.split_once('=').unwrap();
        let value = value.parse().unwrap();
        match key {
            "vm_state_size" => new.vm_state_size = value,
            "vm_clock_nsec" => new.vm_clock_nsec = value,
            "icount" => new.icount = value,
            key => panic!("an unknown field: {key}"),
        }
    }
    new
}
