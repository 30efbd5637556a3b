//! glibc's `getopt_long`, by the options that clap knows.
//!
//! A script that calls `qemu-img snapshot` may rely on what getopt allows (options after the image,
//! abbreviated long options, values that begin with a dash) and on what it says. So the words
//! are brought into one plain form here, with getopt's messages, and clap takes them from there.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use clap::{ArgMatches, Command};

use crate::cli::{ACTIONS, EXTENSIONS};
use crate::stop::Stop;

/// What getopt has to know of an option.
struct Opt {
    short: Option<u8>,
    long: String,
    takes_value: bool,
}

/// The words of a call, in plain form so far.
struct Words<'a> {
    options: &'a [Opt],
    /// What stands before getopt's messages.
    who: &'a str,
    out: Vec<OsString>,
    action: bool,
}

/// Parse the words behind the program's name.
pub(crate) fn parse(
    mut command: Command,
    args: &[OsString],
    who: &str,
) -> Result<ArgMatches, Stop> {
    let options: Vec<Opt> = command
        .get_arguments()
        .filter_map(|a| {
            Some(Opt {
                short: a.get_short().map(|c| c as u8),
                long: a.get_long()?.to_owned(),
                takes_value: a.get_action().takes_values(),
            })
        })
        .collect();
    let mut words = Words {
        options: &options,
        who,
        out: vec![who.into()],
        action: false,
    };
    let operands = words.walk(args).map_err(|stop| match stop {
        Stop::Help(what) if what == "help" => Stop::Help(command.render_help().to_string()),
        Stop::Help(_) => Stop::Help(command.render_version()),
        other => other,
    })?;
    let [file] = operands.as_slice() else {
        return Err(Stop::Usage("Expecting one image file name".into()));
    };
    words.out.extend(["--".into(), file.clone()]);
    Ok(command.try_get_matches_from(words.out)?)
}

impl Words<'_> {
    /// Go through the words as getopt does; what is left over is returned.
    fn walk(&mut self, args: &[OsString]) -> Result<Vec<OsString>, Stop> {
        let in_order = std::env::var_os("POSIXLY_CORRECT").is_some();
        let mut operands = Vec::new();
        let mut rest = args.iter();
        while let Some(word) = rest.next() {
            let bytes = word.as_bytes();
            if bytes == b"--" {
                break;
            } else if let Some(long) = bytes.strip_prefix(b"--") {
                self.long(long, &mut rest)?;
            } else if bytes.len() > 1 && bytes.starts_with(b"-") {
                self.short(bytes.get(1..).unwrap_or_default(), &mut rest)?;
            } else {
                operands.push(word.clone());
                if in_order {
                    break;
                }
            }
        }
        operands.extend(rest.cloned());
        Ok(operands)
    }

    fn short<'w>(
        &mut self,
        mut cluster: &[u8],
        rest: &mut impl Iterator<Item = &'w OsString>,
    ) -> Result<(), Stop> {
        while let Some((&c, after)) = cluster.split_first() {
            cluster = after;
            let Some(opt) = self.options.iter().find(|o| o.short == Some(c)) else {
                return Err(self.complain(&[b"invalid option -- '", &[c], b"'"]));
            };
            if !opt.takes_value {
                self.take(opt, None)?;
                continue;
            }
            let value = match (cluster.is_empty(), rest) {
                (false, _) => OsStr::from_bytes(cluster),
                (true, rest) => match rest.next() {
                    Some(word) => word,
                    None => {
                        let text: [&[u8]; 3] = [b"option requires an argument -- '", &[c], b"'"];
                        return Err(self.complain(&text));
                    }
                },
            };
            return self.take(opt, Some(value));
        }
        Ok(())
    }

    fn long<'w>(
        &mut self,
        word: &[u8],
        rest: &mut impl Iterator<Item = &'w OsString>,
    ) -> Result<(), Stop> {
        let mut halves = word.splitn(2, |b| *b == b'=');
        let name = halves.next().unwrap_or_default();
        let value = halves.next().map(OsStr::from_bytes);
        let opt = self.find_long(name, word)?;
        let long = opt.long.as_bytes();
        match (opt.takes_value, value) {
            (false, Some(_)) => {
                Err(self.complain(&[b"option '--", long, b"' doesn't allow an argument"]))
            }
            (true, None) => match rest.next() {
                Some(word) => self.take(opt, Some(word)),
                None => Err(self.complain(&[b"option '--", long, b"' requires an argument"])),
            },
            (_, value) => self.take(opt, value),
        }
    }

    fn find_long<'o>(&self, name: &[u8], word: &[u8]) -> Result<&'o Opt, Stop>
    where
        Self: 'o,
    {
        let options = self.options;
        if let Some(exact) = options.iter().find(|o| o.long.as_bytes() == name) {
            return Ok(exact);
        }
        let extends = |o: &Opt| EXTENSIONS.contains(&o.long.as_str());
        let (more, mut candidates): (Vec<&Opt>, Vec<&Opt>) = options
            .iter()
            .filter(|o| o.long.as_bytes().starts_with(name))
            .partition(|o| extends(o));
        if candidates.is_empty() {
            candidates = more;
        }
        match candidates.as_slice() {
            [] => Err(self.complain(&[b"unrecognized option '--", word, b"'"])),
            [one] => Ok(one),
            many => {
                let mut text = [b"option '--", word, b"' is ambiguous; possibilities:"].concat();
                for o in many {
                    text.extend_from_slice(format!(" '--{}'", o.long).as_bytes());
                }
                Err(self.complain(&[&text]))
            }
        }
    }

    /// An option is complete.
    fn take(&mut self, opt: &Opt, value: Option<&OsStr>) -> Result<(), Stop> {
        let name = opt.long.as_str();
        if matches!(name, "help" | "version") {
            return Err(Stop::Help(opt.long.clone()));
        }
        if ACTIONS.contains(&name) && std::mem::replace(&mut self.action, true) {
            return Err(Stop::Usage("Cannot mix '-l', '-a', '-c', '-d'".into()));
        }
        let mut word = format!("--{}", opt.long).into_bytes();
        if let Some(value) = value {
            word.push(b'=');
            word.extend_from_slice(value.as_bytes());
        }
        self.out.push(OsString::from_vec(word));
        Ok(())
    }

    fn complain(&self, text: &[&[u8]]) -> Stop {
        Stop::Options([self.who.as_bytes(), b": ", &text.concat()].concat())
    }
}
