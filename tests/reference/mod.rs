//! The reference images of the C tests.

use std::io::Read;
use std::path::Path;

/// Before and after each operation, by name: those of at most so many bytes.
pub fn images(most: usize) -> Vec<(String, Vec<u8>)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("c-tests/images");
    let mut out = Vec::new();
    for entry in std::fs::read_dir(&root).unwrap().flatten() {
        for file in std::fs::read_dir(entry.path())
            .into_iter()
            .flatten()
            .flatten()
        {
            let name = file.file_name().to_string_lossy().into_owned();
            if !name.ends_with("qcow2.gz") {
                continue;
            }
            let packed = std::fs::read(file.path()).unwrap();
            let mut image = Vec::new();
            let mut unpacked = flate2::read::GzDecoder::new(&packed[..]).take(most as u64 + 1);
            unpacked.read_to_end(&mut image).unwrap();
            if image.len() <= most && image.starts_with(b"QFI\xfb") {
                let folder = entry.file_name().to_string_lossy().into_owned();
                out.push((format!("{folder}/{name}"), image));
            }
        }
    }
    out.sort();
    assert!(out.len() > 100, "the reference images are not there");
    out
}

/// Cases that were made after the first seeds of soaks had been kept.
const LATER: [&str; 9] = [
    "backing-grow-compressed",
    "backing-grow-data",
    "backing-grow-extended",
    "backing-grow-shared",
    "backing-grow-stale",
    "backing-grow-subclusters",
    "backing-grow-tables",
    "backing-grow-zeros",
    "length-cut-freed-slices",
];

/// The images from which seeds draw: the same ones for ever, since a kept seed names one of them by its place.
pub fn for_seeds(mut images: Vec<(String, Vec<u8>)>) -> Vec<(String, Vec<u8>)> {
    images.retain(|(name, _)| !LATER.contains(&name.split('/').next().unwrap_or_default()));
    images
}
