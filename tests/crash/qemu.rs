//! What qemu-img and qemu-io say of an image.

use std::path::PathBuf;
use std::process::{Command, Output};
use std::sync::atomic::{AtomicU64, Ordering};

use super::judge::{judge, Snap, Verdict};

const COPIED: u64 = 1 << 63;
/// A guest writes this much of a larger disk.
const MOST_WRITTEN: u64 = 64 << 20;

pub struct Qemu {
    dir: PathBuf,
    next: AtomicU64,
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.dir);
    }
}

fn text(out: &Output) -> String {
    let text = [&out.stdout[..], &out.stderr[..]].concat();
    String::from_utf8_lossy(&text).into_owned()
}

impl Qemu {
    /// `None` without qemu-img and qemu-io.
    pub fn find() -> Option<Qemu> {
        for tool in ["qemu-img", "qemu-io"] {
            Command::new(tool).arg("--version").output().ok()?;
        }
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let name = format!(
            "qcow2-crash-{}-{}",
            std::process::id(),
            NUMBER.fetch_add(1, Ordering::Relaxed)
        );
        let shm = PathBuf::from("/dev/shm").join(&name);
        let dir = if std::fs::create_dir_all(&shm).is_ok() {
            shm
        } else {
            let dir = std::env::temp_dir().join(name);
            std::fs::create_dir_all(&dir).ok()?;
            dir
        };
        Some(Qemu {
            dir,
            next: AtomicU64::new(0),
        })
    }

    fn run(&self, tool: &str, args: &[&str]) -> Output {
        Command::new(tool)
            .args(args)
            .current_dir(&self.dir)
            .env("LC_ALL", "C")
            .output()
            .unwrap_or_else(|e| panic!("{tool}: {e}"))
    }

    /// What `qemu-img check` says.
    pub fn check(&self, image: &[u8]) -> String {
        let name = format!("{}.qcow2", self.next.fetch_add(1, Ordering::Relaxed));
        let path = self.dir.join(&name);
        if let Err(e) = std::fs::write(&path, image) {
            return e.to_string();
        }
        let said = text(&self.run("qemu-img", &["check", "-f", "qcow2", &name]));
        let _ = std::fs::remove_file(path);
        said
    }

    /// Judge an image that the in-process judge has passed: `check` finds nothing but leaks and
    /// harmless flags; a guest that writes the whole disk, before and after a repair, harms no
    /// snapshot.
    pub fn agrees(&self, image: &[u8], verdict: &Verdict) -> Result<(), String> {
        let name = format!("{}.qcow2", self.next.fetch_add(1, Ordering::Relaxed));
        let path = self.dir.join(&name);
        let result = self.agrees_on(image, verdict, &name, &path);
        let _ = std::fs::remove_file(path);
        result
    }

    fn agrees_on(
        &self,
        image: &[u8],
        verdict: &Verdict,
        name: &str,
        path: &PathBuf,
    ) -> Result<(), String> {
        let io = |e: std::io::Error| e.to_string();
        std::fs::write(path, image).map_err(io)?;
        let check = self.run("qemu-img", &["check", "-f", "qcow2", name]);
        let said = text(&check);
        for line in said.lines().filter(|l| l.starts_with("ERROR")) {
            harmless(line, verdict)?;
        }
        if !matches!(check.status.code(), Some(0 | 2 | 3)) {
            return Err(format!("qemu-img check: {:?} {said}", check.status));
        }
        self.guest_writes(name, path, verdict, "")?;
        if verdict.unknown_autoclear {
            // QEMU 10's own: with an unknown autoclear bit `check -r` rewrites the header before it
            // has read the snapshot table, and so drops every snapshot of a sound image.
            return Ok(());
        }

        std::fs::write(path, image).map_err(io)?;
        let repair = self.run("qemu-img", &["check", "-f", "qcow2", "-r", "all", name]);
        if !repair.status.success() {
            return Err(format!("qemu-img check -r all: {}", text(&repair)));
        }
        let after = judge(&std::fs::read(path).map_err(io)?)
            .map_err(|e| format!("after the repair: {e}"))?;
        if after.state.disk != verdict.state.disk || after.state.size != verdict.state.size {
            return Err("after the repair the active disk reads otherwise".into());
        }
        snapshots_read(&after, verdict, "after the repair")?;
        if after.leaks != 0 || after.odd_flags != 0 {
            return Err(format!(
                "the repair left {} leaks, {} flags: {}",
                after.leaks,
                after.odd_flags,
                text(&repair)
            ));
        }
        self.guest_writes(name, path, verdict, "after the repair and ")
    }

    fn guest_writes(
        &self,
        name: &str,
        path: &PathBuf,
        verdict: &Verdict,
        when: &str,
    ) -> Result<(), String> {
        let size = verdict.state.size.min(MOST_WRITTEN);
        if size == 0 {
            return Ok(());
        }
        let write = format!("write -P 0xa5 0 {size}");
        let out = self.run("qemu-io", &["-f", "qcow2", "-c", &write, name]);
        let said = text(&out);
        if !out.status.success() || !said.contains(&format!("wrote {size}/{size}")) {
            return Err(format!("{when}a guest cannot write: {said}"));
        }
        let after = judge(&std::fs::read(path).map_err(|e| e.to_string())?)
            .map_err(|e| format!("{when}after a guest wrote the disk: {e}"))?;
        snapshots_read(
            &after,
            verdict,
            &format!("{when}after a guest wrote the disk"),
        )
    }
}

fn snapshots_read(after: &Verdict, before: &Verdict, when: &str) -> Result<(), String> {
    let contents = |v: &Verdict| -> Vec<_> {
        v.state
            .snaps
            .iter()
            .map(|s| (s.id.clone(), s.name.clone(), s.content))
            .collect()
    };
    if contents(after) != contents(before) {
        return Err(format!(
            "{when} a snapshot reads otherwise: {} and now {}",
            before.state.describe(),
            after.state.describe()
        ));
    }
    Ok(())
}

/// The one kind of error that a crash may leave: a flag of the active disk that does not say what
/// the count says, where that costs a copy or a leak. Without COPIED on a cluster counted once, a
/// guest copies it needlessly. With COPIED on a cluster counted twice, a guest writes in place,
/// which harms nobody as long as no published snapshot names the cluster.
fn harmless(line: &str, verdict: &Verdict) -> Result<(), String> {
    let bad = || Err(format!("qemu-img check: {line}"));
    // No damage: version 3 wants the disk size in every entry, and other programs leave it out.
    if let Some(rest) = line.strip_prefix("ERROR snapshot table entry ") {
        let index = rest.strip_suffix(" is incomplete").map(str::parse);
        let Some(Ok(index)) = index else { return bad() };
        let snap: Option<&Snap> = verdict.state.snaps.get::<usize>(index);
        return match snap {
            Some(s) if s.disk_size.is_none() => Ok(()),
            _ => bad(),
        };
    }
    let Some(rest) = line.strip_prefix("ERROR OFLAG_COPIED ") else {
        return bad();
    };
    let (mut entry, mut count) = (None, None);
    for word in rest.split_whitespace() {
        match word.split_once('=') {
            Some(("l1_entry" | "l2_entry", hex)) => entry = u64::from_str_radix(hex, 16).ok(),
            Some(("refcount", n)) => count = n.parse::<u64>().ok(),
            _ => {}
        }
    }
    match (entry, count) {
        (Some(entry), Some(1)) if entry & COPIED == 0 => Ok(()),
        (Some(entry), Some(n)) if n >= 2 && entry & COPIED != 0 => {
            let cluster = (entry & 0x00ff_ffff_ffff_fe00) >> verdict.cluster_bits;
            if verdict.named.contains(&cluster) {
                return bad();
            }
            Ok(())
        }
        _ => bad(),
    }
}
