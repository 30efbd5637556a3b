//! The rules of the module's page, asked of the steps themselves; and the steps in words.

use super::steps::{Pass, Step, What, Write};
#[cfg(test)]
use crate::image::replay::walk::Marked;

/// The first rule that the steps break.
pub(crate) fn broken_rule(steps: &[Step]) -> Option<&'static str> {
    let broken = |rule: &'static str, kept: bool| (!kept).then_some(rule);
    let (mut published, mut done, mut unstable, mut meant) = (false, false, false, false);
    for (i, step) in steps.iter().enumerate() {
        let next = steps.get(i + 1);
        let problem = match step {
            Step::Stream(Pass::Raise(_)) => {
                broken("counts go up before anything is published", !published)
            }
            Step::Stream(Pass::Clear(_)) => {
                broken("COPIED is cleared before anything is published", !published)
            }
            Step::Stream(Pass::Lower(..)) => {
                broken("counts go down when the verb has taken effect", done)
            }
            Step::Stream(Pass::Set(_)) => {
                broken("COPIED is set when the verb has taken effect", done)
            }
            Step::Punch(..) | Step::Discard(..) | Step::Cut(_) => broken(
                "nothing is thrown away before the verb has taken effect",
                done,
            ),
            Step::Publish(_) if unstable => Some("what is published is stable before"),
            Step::Publish(_) if !matches!(next, Some(Step::Barrier)) => {
                Some("a publish is stable before anything else is written")
            }
            Step::Publish(writes) => {
                let means = writes.iter().any(changes_meaning);
                let again = means && (meant || done);
                meant |= means;
                broken("what the image means changes once", !again)
            }
            Step::Entries(_) if unstable => Some("what entries name is stable before"),
            Step::Entries(_) if !matches!(next, Some(Step::Barrier)) => {
                Some("entries are stable before anything else is written")
            }
            Step::Done => broken("a verb takes effect once", !done),
            Step::Write(_) | Step::Try(..) | Step::Fill(..) if meant && !done => {
                Some("the decisive publish is all that is between two states")
            }
            _ => None,
        };
        if problem.is_some() {
            return problem;
        }
        match step {
            Step::Barrier => unstable = false,
            Step::Publish(_) => (published, unstable) = (true, true),
            Step::Done => done = true,
            Step::Begin(..) | Step::End => {}
            _ => unstable = true,
        }
    }
    broken("a verb takes effect", done).or(broken("success is stable", !unstable))
}

/// Does a write switch the disk size or the snapshot table?
fn changes_meaning(write: &Write) -> bool {
    let What::Bytes(bytes) = &write.what else {
        return false; // an L1 table
    };
    let (first, end) = (write.at, write.at + bytes.len() as u64);
    let covers = |a: u64, b: u64| first < b && a < end;
    covers(24, 32) || covers(60, 72)
}

/// The steps, one a line.
#[cfg(test)]
pub(crate) fn text(steps: &[Step]) -> String {
    use std::fmt::Write as _;
    let mut out = String::new();
    for step in steps {
        let _ = match step {
            Step::Begin(stage, work) => writeln!(out, "{stage:?}, {work} clusters"),
            Step::End => writeln!(out, "end"),
            Step::Write(w) => writeln!(out, "  write {w}"),
            Step::Try(w, _) => writeln!(out, "  try {w}"),
            Step::Fill(at, bytes) => writeln!(out, "  fill holes {at:#x}+{bytes:#x}"),
            Step::GiveBack(t) => writeln!(out, "  give back {:#x}", t.offset),
            Step::Truncate(length) => writeln!(out, "  file {length:#x}"),
            Step::Barrier => writeln!(out, "  B"),
            Step::Publish(writes) => writes
                .iter()
                .try_for_each(|w| writeln!(out, "  PUBLISH {w}")),
            Step::Entries(writes) => writes.iter().try_for_each(|w| writeln!(out, "  enter {w}")),
            Step::Done => writeln!(out, "  DONE"),
            Step::Stream(pass) => writeln!(out, "  {pass}"),
            Step::Punch(ranges, _) => writeln!(out, "  punch what became free, and {ranges:x?}"),
            Step::Discard(at, bytes) => writeln!(out, "  punch {at:#x}+{bytes:#x}"),
            Step::Grow(length) => writeln!(out, "  file at least {length:#x}"),
            Step::Cut(length) => writeln!(out, "  file at most {length:#x}"),
        };
    }
    out
}

#[cfg(test)]
impl std::fmt::Display for Write {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} at {:#x}", self.label, self.at)?;
        match &self.what {
            What::Bytes(bytes) => write!(f, "+{:#x}", bytes.len()),
            What::Words(_, when, bytes) => write!(f, "+{:#x} ({when:?})", bytes.len()),
            What::Block(index) => write!(f, " (block {index})"),
            What::Table { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
impl std::fmt::Display for Pass {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let offsets = |marked: &[Marked]| marked.iter().map(|m| m.offset).collect::<Vec<_>>();
        match self {
            Pass::Raise(blocks) => write!(f, "counts up, refcount blocks {blocks:?}"),
            Pass::Lower(blocks, _) => write!(f, "counts down, refcount blocks {blocks:?}"),
            Pass::Clear(tables) => write!(f, "COPIED cleared, L2 tables {:x?}", offsets(tables)),
            Pass::Set(tables) => write!(f, "COPIED set, L2 tables {:x?}", offsets(tables)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(at: u64, bytes: usize) -> Step {
        Step::Publish(vec![Write {
            label: "header",
            at,
            what: What::Bytes(vec![0; bytes]),
        }])
    }

    fn data() -> Step {
        Step::Write(Write {
            label: "snapshot table",
            at: 4096,
            what: What::Bytes(vec![0; 8]),
        })
    }

    fn raise() -> Step {
        Step::Stream(Pass::Raise(vec![0]))
    }

    fn lower() -> Step {
        Step::Stream(Pass::Lower(vec![0], 0..0))
    }

    #[test]
    fn each_rule_is_noticed_when_it_is_broken() {
        use Step::{Barrier, Done};
        let good = vec![
            data(),
            raise(),
            Barrier,
            header(60, 12),
            Barrier,
            Done,
            lower(),
            Barrier,
        ];
        assert_eq!(broken_rule(&good), None);
        let tables_move_first = vec![
            data(),
            raise(),
            Barrier,
            header(40, 12),
            Barrier,
            data(),
            Barrier,
            header(24, 8),
            Barrier,
            Done,
            lower(),
            Barrier,
        ];
        assert_eq!(broken_rule(&tables_move_first), None);
        let cases = [
            (
                "counts go up before anything is published",
                vec![
                    data(),
                    Barrier,
                    header(60, 12),
                    Barrier,
                    raise(),
                    Barrier,
                    Done,
                    Barrier,
                ],
            ),
            (
                "counts go down when the verb has taken effect",
                vec![lower(), Barrier, header(60, 12), Barrier, Done, Barrier],
            ),
            (
                "what is published is stable before",
                vec![data(), header(60, 12), Barrier, Done, Barrier],
            ),
            (
                "a publish is stable before anything else is written",
                vec![data(), Barrier, header(60, 12), Done, lower(), Barrier],
            ),
            (
                "what entries name is stable before",
                vec![
                    header(60, 12),
                    Barrier,
                    Done,
                    data(),
                    Step::Entries(vec![]),
                    Barrier,
                ],
            ),
            (
                "entries are stable before anything else is written",
                vec![
                    header(60, 12),
                    Barrier,
                    Done,
                    Step::Entries(vec![]),
                    lower(),
                    Barrier,
                ],
            ),
            (
                "what the image means changes once",
                vec![
                    data(),
                    Barrier,
                    header(24, 8),
                    Barrier,
                    header(60, 12),
                    Barrier,
                    Done,
                    Barrier,
                ],
            ),
            (
                "the decisive publish is all that is between two states",
                vec![
                    header(24, 8),
                    Barrier,
                    data(),
                    Barrier,
                    header(40, 8),
                    Barrier,
                    Done,
                ],
            ),
            (
                "nothing is thrown away before the verb has taken effect",
                vec![
                    Step::Punch(vec![], 0),
                    Barrier,
                    header(60, 12),
                    Barrier,
                    Done,
                ],
            ),
            (
                "a verb takes effect once",
                vec![
                    data(),
                    Barrier,
                    header(60, 12),
                    Barrier,
                    Done,
                    Done,
                    Barrier,
                ],
            ),
            ("a verb takes effect", vec![data(), Barrier]),
            (
                "success is stable",
                vec![data(), Barrier, header(60, 12), Barrier, Done, lower()],
            ),
        ];
        for (rule, steps) in cases {
            assert_eq!(broken_rule(&steps), Some(rule));
        }
    }
}
