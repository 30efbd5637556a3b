//! A random image and a random chain of verbs, both from one seed.

use super::craft;
use super::files::R;
use super::generate::Spec;
use super::ours::Verb;
use super::qimg::Qcow;
use super::rng::Rng;
use super::run::{Ctx, Run, Stats};

/// Run one seed; the statistics and, on a difference, its report.
pub fn run_seed(ctx: &Ctx, seed: u64) -> (Stats, Result<(), String>) {
    let mut run = match Run::new(ctx, &format!("seed {seed}")) {
        Ok(r) => r,
        Err(e) => return (Stats::default(), Err(e)),
    };
    let r = chain(&mut run, seed);
    (
        run.stats.clone(),
        r.map_err(|e| {
            if e.starts_with("seed") {
                e
            } else {
                format!(
                    "seed {seed}: the driver failed: {e}\n{}",
                    run.tools.log.join("\n")
                )
            }
        }),
    )
}

fn chain(run: &mut Run, seed: u64) -> R<()> {
    let mut rng = Rng::new(seed);
    let mut spec = Spec::new(&mut rng);
    spec.build(&mut rng, &mut run.tools)?;
    let names = names(&mut rng);
    for round in 0..rng.range(3, 9) {
        let least = u64::from(round == 0);
        for _ in 0..rng.range(least, 3) {
            spec.guest(&mut rng, &mut run.tools)?;
            run.stats.guest += 1;
        }
        if rng.chance(50) {
            craft_one(&mut rng, run, &spec)?;
        }
        run.sync()?;
        run.keep_handle = rng.chance(50);
        for _ in 0..rng.range(1, 5) {
            let v = choose(&mut rng, run, &names)?;
            run.verb(&v)?;
        }
        run.keep_handle = false;
        // Of the same image, so the chain goes on as it would without.
        let once = u64::from(rng.chance(60));
        for n in 0..super::number("DIFF_SETS").unwrap_or(once) {
            run.many(&mut Rng::new(seed ^ round ^ n << 32))?;
        }
    }
    Ok(())
}

fn craft_one(rng: &mut Rng, run: &mut Run, spec: &Spec) -> R<()> {
    let path = run.qemu.clone();
    let (what, done) = match rng.below(17) {
        0..=1 => (
            "strange IDs and names",
            craft::edit_table(&path, rng, |e, r| craft::strange_entries(e, r))?,
        ),
        2..=4 => (
            "strange extra data",
            craft::edit_table(&path, rng, |e, r| craft::strange_extra(e, r))?,
        ),
        5..=6 => (
            "garbage in free clusters",
            craft::garbage_in_free(&path, rng)?,
        ),
        7..=8 => ("end of the file cut", craft::cut_end(&path, rng)?),
        9..=10 | 16 if !spec.bitmaps => ("active L1 shortened", craft::shorten_l1(&path, rng)?),
        11 => ("leaked clusters", craft::leak(&path, rng)?),
        12 => (
            "unknown autoclear bit",
            craft::unknown_autoclear(&path, rng)?,
        ),
        13 if !spec.bitmaps => ("wrong COPIED bits", craft::odd_bits(&path, rng, false)?),
        14 if !spec.bitmaps => ("reserved bits set", craft::odd_bits(&path, rng, true)?),
        _ => ("", false),
    };
    if done {
        run.tools.note(format!("crafted: {what}"));
        *run.stats.crafts.entry(what).or_default() += 1;
    }
    Ok(())
}

fn names(rng: &mut Rng) -> Vec<Vec<u8>> {
    let mut v: Vec<Vec<u8>> = vec![
        b"a".to_vec(),
        b"b".to_vec(),
        b"1".to_vec(),
        b"2".to_vec(),
        b"snap".to_vec(),
    ];
    for _ in 0..3 {
        v.push(match rng.below(9) {
            0 => vec![],
            1 => vec![b'n'; 255],
            2 => vec![b'n'; 256],
            3 => "снимок 快照 📷".as_bytes().to_vec(),
            4 => vec![b'm'; rng.range(1, 254) as usize],
            5 => b"\xff\xfe\x80".to_vec(),
            6 => "é".repeat(127).into_bytes(),
            7 => "é".repeat(140).into_bytes(),
            _ => format!("{}", rng.below(1000)).into_bytes(),
        });
    }
    v
}

fn choose(rng: &mut Rng, run: &Run, names: &[Vec<u8>]) -> R<Verb> {
    let q = Qcow::open(&run.qemu)?;
    let n = q.snaps.len() as u64;
    let create = if n == 0 {
        85
    } else if n > 12 {
        20
    } else {
        42
    };
    let roll = rng.below(100);
    if roll < create {
        return Ok(Verb::Create {
            name: rng.pick(names).clone(),
        });
    }
    let existing = n > 0 && !rng.chance(4);
    let pick = |rng: &mut Rng, id: bool| {
        if existing {
            let e = rng.pick(&q.snaps);
            if id {
                e.id.clone()
            } else {
                e.name.clone()
            }
        } else {
            rng.pick(&[b"nobody".to_vec(), b"99".to_vec(), vec![]])
                .clone()
        }
    };
    if roll < create + (100 - create) * 55 / 100 {
        let id = rng.chance(60);
        return Ok(Verb::Goto {
            what: pick(rng, id),
        });
    }
    let id = rng.chance(6);
    let name = pick(rng, id);
    run.delete_verb(&name, rng.below(3))
}
