//! The options, once: for the parser, the help page, the completions and the manual page.

use std::ffi::{OsStr, OsString};

use clap::builder::OsStringValueParser;
use clap::{Arg, ArgAction, ArgMatches, Command, ValueHint};

/// The program's own name.
pub(crate) const NAME: &str = "qcow2-snapshot";
/// First words that are no image.
pub(crate) const SUBCOMMANDS: [&str; 11] = [
    "list",
    "create",
    "revert",
    "delete",
    "rename",
    "du",
    "diff",
    "export",
    "check",
    "flatten",
    "completions",
];
/// Long options that QEMU does not have. An abbreviation that also fits options of QEMU means those.
pub(crate) const EXTENSIONS: [&str; 3] = ["output", "no-lock", "version"];
/// Shells with a completion script.
pub(crate) const SHELLS: [&str; 3] = ["bash", "zsh", "fish"];
/// The options of which there can be one.
pub(crate) const ACTIONS: [&str; 4] = ["list", "apply", "create", "delete"];

const AFTER: &str = "\
Only one of -l, -a, -c and -d can be given; without any the snapshots are listed.
Every option above but --output, --no-lock and --version is also one of 'qemu-img snapshot'.

A link to this program that is named qemu-img and stands early in PATH serves
'qemu-img snapshot' and hands everything else to the qemu-img behind it.";

fn flag(long: &'static str, short: Option<char>, help: &'static str) -> Arg {
    let arg = Arg::new(long)
        .long(long)
        .help(help)
        .overrides_with(long)
        .action(ArgAction::SetTrue);
    match short {
        Some(c) => arg.short(c),
        None => arg,
    }
}

/// Where the hint is `Other` and the value's name SNAPSHOT, one that exists is meant: the
/// completions offer the image's.
fn valued(long: &'static str, short: Option<char>, value: &'static str, help: &'static str) -> Arg {
    let arg = Arg::new(long)
        .long(long)
        .help(help)
        .value_name(value)
        .value_parser(OsStringValueParser::new())
        .value_hint(ValueHint::Other)
        .allow_hyphen_values(true)
        .action(ArgAction::Append);
    match short {
        Some(c) => arg.short(c),
        None => arg,
    }
}

fn no_lock() -> Arg {
    flag(
        "no-lock",
        None,
        "Take no image lock, where the file system refuses them: nobody else may use the image meanwhile",
    )
}

/// Of the subcommands that change an image.
fn repair() -> Arg {
    flag(
        "repair",
        None,
        "First repair the image, as 'check -r all' does: after a crash of its guest, or damage",
    )
}

/// `--help` where clap may print its page at once.
fn help() -> Arg {
    flag("help", Some('h'), "Print this help and exit").action(ArgAction::Help)
}

/// The options of `qemu-img snapshot`.
fn qemu_options(command: Command) -> Command {
    command
        .disable_help_flag(true)
        .arg(flag("help", Some('h'), "Print this help and exit"))
        .arg(valued(
            "format",
            Some('f'),
            "FMT",
            "The image's format: qcow2; without it the image is probed",
        ))
        .arg(flag(
            "image-opts",
            None,
            "FILE is an option string (driver=qcow2,file.filename=PATH), not a file name",
        ))
        .arg(flag(
            "list",
            Some('l'),
            "List the snapshots in FILE (default)",
        ))
        .arg(valued(
            "apply",
            Some('a'),
            "SNAPSHOT",
            "Make the disk what the snapshot with this ID, else with this name, holds",
        ))
        .arg(
            valued(
                "create",
                Some('c'),
                "SNAPSHOT",
                "Create a snapshot with this name",
            )
            .value_hint(ValueHint::Unknown),
        )
        .arg(valued(
            "delete",
            Some('d'),
            "SNAPSHOT",
            "Delete the first snapshot with this name",
        ))
        .arg(flag(
            "force-share",
            Some('U'),
            "Open the image even if a guest writes to it (to list only)",
        ))
        .arg(flag("quiet", Some('q'), "Show no progress, only errors"))
        .arg(valued(
            "object",
            None,
            "OBJDEF",
            "QEMU user-creatable object: refused, there is no object system here",
        ))
        .arg(
            Arg::new("FILE")
                .help("The image, or an option string with --image-opts")
                .required(true)
                .value_hint(ValueHint::FilePath)
                .value_parser(OsStringValueParser::new()),
        )
}

/// What `qemu-img snapshot` takes, and no more.
pub(crate) fn link_command() -> Command {
    qemu_options(
        Command::new("snapshot")
            .bin_name("qemu-img snapshot")
            .about(
                "List or manipulate the snapshots in an image (qcow2-snapshot in qemu-img's place)",
            ),
    )
}

/// Everything that `qcow2-snapshot` takes.
pub(crate) fn command() -> Command {
    let command = Command::new(NAME)
        .version(env!("CARGO_PKG_VERSION"))
        .about("List, create, apply, delete and export the internal snapshots of qcow2 images")
        .after_help(AFTER)
        .args_conflicts_with_subcommands(true)
        .subcommand_negates_reqs(true)
        .disable_help_subcommand(true)
        .disable_version_flag(true);
    qemu_options(command)
        .arg(
            Arg::new("output")
                .long("output")
                .value_name("FORMAT")
                .help("How to list: human, or json with the field names of 'qemu-img info'")
                .value_parser(["human", "json"])
                .action(ArgAction::Append),
        )
        .arg(no_lock())
        .arg(flag("version", None, "Print the version and exit"))
        .subcommand(list_command())
        .subcommand(create_command())
        .subcommand(revert_command())
        .subcommand(delete_command())
        .subcommand(rename_command())
        .subcommand(du_command())
        .subcommand(check_command())
        .subcommand(diff_command())
        .subcommand(flatten_command())
        .subcommand(export_command())
        .subcommand(
            Command::new("completions")
                .infer_long_args(true)
                .about("Print a completion script for a shell")
                .arg(help())
                .arg(Arg::new("SHELL").required(true).value_parser(SHELLS)),
        )
}

fn operand(name: &'static str, help: &'static str, hint: ValueHint) -> Arg {
    Arg::new(name)
        .help(help)
        .required(true)
        .value_hint(hint)
        .value_parser(OsStringValueParser::new())
}

/// A subcommand and what all of them have.
fn subcommand(name: &'static str, about: &'static str) -> Command {
    Command::new(name)
        .infer_long_args(true)
        .about(about)
        .arg(help())
}

fn share() -> Arg {
    flag(
        "force-share",
        Some('U'),
        "Open the image even if a guest writes to it: the result may be torn",
    )
}

fn quiet() -> Arg {
    flag("quiet", Some('q'), "Show no progress, only errors")
}

fn output(help: &'static str) -> Arg {
    Arg::new("output")
        .long("output")
        .value_name("FORMAT")
        .help(help)
        .value_parser(["human", "json"])
        .overrides_with("output")
}

fn image_operand() -> Arg {
    operand("IMAGE", "The qcow2 image", ValueHint::FilePath)
}

fn list_command() -> Command {
    subcommand("list", "List the snapshots, as -l")
        .arg(share())
        .arg(no_lock())
        .arg(output("How to list: human, or json as 'qemu-img info'"))
        .arg(image_operand())
}

fn create_command() -> Command {
    subcommand("create", "Create a snapshot, as -c")
        .arg(output(
            "How to show what was made: human (nothing), or json",
        ))
        .arg(repair())
        .arg(no_lock())
        .arg(quiet())
        .arg(image_operand())
        .arg(operand(
            "NAME",
            "The new snapshot's name",
            ValueHint::Unknown,
        ))
}

fn revert_command() -> Command {
    subcommand("revert", "Make the disk what a snapshot holds, as -a")
        .arg(
            valued(
                "save-as",
                None,
                "NAME",
                "First create a snapshot with this name of the disk as it is, so that nothing is lost",
            )
            .value_hint(ValueHint::Unknown)
            .action(ArgAction::Set),
        )
        .arg(output("How to show what the disk is now: human (nothing), or json"))
        .arg(repair())
        .arg(no_lock())
        .arg(quiet())
        .arg(image_operand())
        .arg(operand("SNAPSHOT", "Its ID, else its name", ValueHint::Other))
}

fn rename_command() -> Command {
    subcommand("rename", "Give a snapshot another name")
        .arg(output(
            "How to show what was renamed: human (nothing), or json",
        ))
        .arg(repair())
        .arg(no_lock())
        .arg(quiet())
        .arg(image_operand())
        .arg(operand(
            "SNAPSHOT",
            "Its ID, else its name",
            ValueHint::Other,
        ))
        .arg(operand(
            "NAME",
            "Its new name, at most 255 bytes",
            ValueHint::Unknown,
        ))
}

/// Operands that choose snapshots.
fn snapshots(help: &'static str) -> Arg {
    operand("SNAPSHOT", help, ValueHint::Other)
        .required(false)
        .action(ArgAction::Append)
        .num_args(0..)
}

fn delete_command() -> Command {
    subcommand(
        "delete",
        "Delete snapshots, all that are meant at once or none",
    )
    .arg(flag("id", None, "Each SNAPSHOT is an ID").conflicts_with("name"))
    .arg(flag(
        "name",
        None,
        "Each SNAPSHOT is a name: all that have it are meant",
    ))
    .arg(
        Arg::new("keep-last")
            .long("keep-last")
            .value_name("N")
            .help("Of those that are meant, or of all, leave the N newest")
            .value_parser(clap::value_parser!(usize)),
    )
    .arg(
        Arg::new("older-than")
            .long("older-than")
            .value_name("AGE")
            .help("Of those that are meant, or of all, only the ones that are older: 12h, 30d, 8w")
            .value_parser(crate::select::age),
    )
    .arg(flag("all", None, "All snapshots").conflicts_with("SNAPSHOT"))
    .arg(flag(
        "dry-run",
        Some('n'),
        "Show what would go and what that would free, and change nothing",
    ))
    .arg(flag(
        "yes",
        Some('y'),
        "Do not ask, on a terminal, before more than one goes",
    ))
    .arg(output(
        "How to show what went: human (on a terminal), or json",
    ))
    .arg(repair())
    .arg(no_lock())
    .arg(quiet())
    .arg(image_operand())
    .arg(snapshots(
        "An ID, else a name, else a pattern for names ('auto-*')",
    ))
}

fn du_command() -> Command {
    subcommand(
        "du",
        "Show what snapshots hold, and what deleting them would free",
    )
    .arg(share())
    .arg(no_lock())
    .arg(output("How to show it: human, or json"))
    .arg(quiet())
    .arg(image_operand())
    .arg(snapshots(
        "An ID, else a name, else a pattern for names; without any all snapshots and the disk",
    ))
}

fn diff_command() -> Command {
    Command::new("diff")
        .infer_long_args(true)
        .about("Show what changed on the disk from one snapshot to another, or to the disk as it is")
        .arg(help())
        .arg(flag(
            "compare",
            None,
            "Compare the data too, and show exactly what differs; without it only tables are read",
        ))
        .arg(flag(
            "force-share",
            Some('U'),
            "Open the image even if a guest writes to it: the result may be torn",
        ))
        .arg(flag("quiet", Some('q'), "Show no progress, only errors"))
        .arg(
            Arg::new("output")
                .long("output")
                .value_name("FORMAT")
                .help("How to show it: human, or json with the fields of 'qemu-img map' and what was there")
                .value_parser(["human", "json"])
                .overrides_with("output"),
        )
        .arg(operand("IMAGE", "The qcow2 image", ValueHint::FilePath))
        .arg(operand(
            "FROM",
            "The older snapshot's ID, else its name",
            ValueHint::Other,
        ))
        .arg(
            operand(
                "TO",
                "The newer snapshot; without it the disk as it is",
                ValueHint::Other,
            )
            .required(false),
        )
}

fn flatten_command() -> Command {
    Command::new("flatten")
        .infer_long_args(true)
        .about("Copy in what the backing file shows in the disk and in each snapshot, and let go of it")
        .arg(help())
        .arg(flag(
            "dry-run",
            None,
            "Only say how much would be copied at most",
        ))
        .arg(repair())
        .arg(no_lock())
        .arg(flag("quiet", Some('q'), "Show no progress, only errors"))
        .arg(operand("IMAGE", "The qcow2 image", ValueHint::FilePath))
}

fn export_command() -> Command {
    let one = |name, help| {
        operand(name, help, ValueHint::Other)
            .required(false)
            .required_unless_present("all")
            .conflicts_with("all")
    };
    Command::new("export")
        .infer_long_args(true)
        .about("Write the disk that a snapshot holds to a new raw or qcow2 file")
        .arg(help())
        .arg(
            Arg::new("format")
                .short('O')
                .long("format")
                .value_name("FORMAT")
                .help("What to make: raw (sparse; the default), or qcow2 (thin, compressed clusters as they are)")
                .value_parser(["raw", "qcow2"])
                .overrides_with("format"),
        )
        .arg(
            valued(
                "since",
                None,
                "SNAPSHOT",
                "Only what changed since this snapshot, as a qcow2 overlay over BACKING",
            )
            .requires("backing")
            .action(ArgAction::Set),
        )
        .arg(
            valued(
                "backing",
                Some('b'),
                "BACKING",
                "With --since: the file that holds the disk of that snapshot; relative to OUT's folder",
            )
            .value_hint(ValueHint::FilePath)
            .requires_all(["since", "backing-format"])
            .action(ArgAction::Set),
        )
        .arg(
            Arg::new("backing-format")
                .short('F')
                .long("backing-format")
                .value_name("FMT")
                .help("BACKING's format: qcow2 or raw")
                .value_parser(["qcow2", "raw"])
                .requires("backing")
                .overrides_with("backing-format"),
        )
        .arg(
            valued(
                "all",
                None,
                "DIR",
                "Every snapshot, oldest first, as a chain of qcow2 files in the new folder DIR, with index.json",
            )
            .value_hint(ValueHint::DirPath)
            .conflicts_with("since")
            .action(ArgAction::Set),
        )
        .arg(flag(
            "force-share",
            Some('U'),
            "Open the image even if a guest writes to it: the result may be torn",
        ))
        .arg(no_lock())
        .arg(flag(
            "no-reflink",
            None,
            "Copy data also where a raw file could share blocks with the image (XFS, btrfs)",
        ))
        .arg(flag("quiet", Some('q'), "Show no progress, only errors"))
        .arg(operand("IMAGE", "The qcow2 image", ValueHint::FilePath))
        .arg(one("SNAPSHOT", "The snapshot's ID, else its name"))
        .arg(
            one(
                "OUT",
                "The file to make; it must not exist. '-' is the standard output (raw)",
            )
            .value_hint(ValueHint::FilePath),
        )
}

fn check_command() -> Command {
    Command::new("check")
        .about("Check an image as 'qemu-img check' does, and mend it with -r")
        .arg(help())
        .arg(
            Arg::new("repair")
                .long("repair")
                .short('r')
                .value_name("WHAT")
                .help("leaks: give back clusters that are lost; all: mend everything")
                .value_parser(["leaks", "all"]),
        )
        .arg(
            Arg::new("output")
                .long("output")
                .value_name("FORMAT")
                .help("How to say it: human, or json as 'qemu-img check' does")
                .value_parser(["human", "json"]),
        )
        .arg(flag(
            "force-share",
            Some('U'),
            "Open the image even if a guest writes to it: what is found may be wrong",
        ))
        .arg(no_lock())
        .arg(flag("quiet", Some('q'), "Show no progress and no summary"))
        .arg(
            Arg::new("IMAGE")
                .help("The qcow2 image")
                .required(true)
                .value_hint(ValueHint::FilePath)
                .value_parser(OsStringValueParser::new()),
        )
}

/// What to do with the image.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Action<'a> {
    /// `-l`, and nothing.
    List,
    /// `-a SNAPSHOT`
    Apply(&'a OsStr),
    /// `-c SNAPSHOT`
    Create(&'a OsStr),
    /// `-d SNAPSHOT`
    Delete(&'a OsStr),
}

/// A call in the form of `qemu-img snapshot`.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    pub(crate) action: Action<'a>,
    pub(crate) file: &'a OsStr,
    pub(crate) format: Option<&'a OsStr>,
    pub(crate) image_opts: bool,
    pub(crate) object: bool,
    pub(crate) force_share: bool,
    pub(crate) no_lock: bool,
    /// Before it is changed.
    pub(crate) repair: bool,
    pub(crate) quiet: bool,
    pub(crate) json: bool,
}

impl<'a> Request<'a> {
    /// A subcommand's.
    pub(crate) fn of(m: &'a ArgMatches, action: Action<'a>) -> Request<'a> {
        let flag = |id| m.try_get_one::<bool>(id).ok().flatten() == Some(&true);
        let output = m.try_get_one::<String>("output").ok().flatten();
        Request {
            action,
            file: m.get_one::<OsString>("IMAGE").map_or(OsStr::new(""), |f| f),
            format: None,
            image_opts: false,
            object: false,
            force_share: flag("force-share"),
            no_lock: flag("no-lock"),
            repair: flag("repair"),
            quiet: flag("quiet"),
            json: output.is_some_and(|o| o == "json"),
        }
    }

    pub(crate) fn new(m: &'a ArgMatches) -> Request<'a> {
        // Of an option that is given again the last counts, as with getopt.
        let last = |id: &str| -> Option<&'a OsStr> {
            let mut values = m.get_many::<OsString>(id)?;
            values.next_back().map(OsString::as_os_str)
        };
        let action = if let Some(name) = last("apply") {
            Action::Apply(name)
        } else if let Some(name) = last("create") {
            Action::Create(name)
        } else if let Some(name) = last("delete") {
            Action::Delete(name)
        } else {
            Action::List
        };
        let output = m.try_get_many::<String>("output").ok().flatten();
        Request {
            action,
            file: last("FILE").unwrap_or_default(),
            format: last("format"),
            image_opts: m.get_flag("image-opts"),
            object: last("object").is_some(),
            force_share: m.get_flag("force-share"),
            // Not an option under the name qemu-img.
            no_lock: m.try_get_one("no-lock").ok().flatten() == Some(&true),
            repair: false,
            quiet: m.get_flag("quiet"),
            // It says how to list.
            json: matches!(action, Action::List)
                && output
                    .and_then(|mut o| o.next_back())
                    .is_some_and(|o| o == "json"),
        }
    }
}
