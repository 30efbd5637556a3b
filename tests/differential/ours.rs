//! Our side: the C ABI of the shared library, loaded as a C program would load it. The structs
//! and signatures are written here from the contract, not taken from the crate.
#![allow(unsafe_code, clippy::missing_transmute_annotations)]

use std::ffi::{c_char, c_int, c_void, CStr, CString};
use std::path::{Path, PathBuf};

use super::craft;
use super::files::R;
use super::qemu::{path_bytes, Failure, Tools};

#[repr(C)]
#[derive(Clone, Copy)]
pub struct SnInfo {
    id_str: [c_char; 128],
    name: [c_char; 256],
    vm_state_size: u64,
    date_sec: u32,
    date_nsec: u32,
    vm_clock_nsec: u64,
    icount: u64,
}
const _: () = assert!(std::mem::size_of::<SnInfo>() == 416);

/// What `qcow2_snapshot_usage` says.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct Usage {
    pub referenced: u64,
    pub exclusive: u64,
    pub tables: u64,
    pub vm_state: u64,
    pub allocated: u64,
    pub reserved: [u64; 3],
}

type Bs = *mut c_void;
type Err = *mut c_void;

/// The functions of the library that the driver calls.
#[derive(Clone, Copy)]
pub struct Lib {
    open: unsafe extern "C" fn(*const c_char, c_int, *mut Bs, *mut Err) -> c_int,
    close: unsafe extern "C" fn(Bs) -> c_int,
    create: unsafe extern "C" fn(Bs, *mut SnInfo) -> c_int,
    goto: unsafe extern "C" fn(Bs, *const c_char) -> c_int,
    delete: unsafe extern "C" fn(Bs, *const c_char, *const c_char, *mut Err) -> c_int,
    usage: unsafe extern "C" fn(Bs, *const *const c_char, usize, *mut Usage, *mut Err) -> c_int,
    delete_many: unsafe extern "C" fn(Bs, *const *const c_char, usize, *mut Err) -> c_int,
    list: unsafe extern "C" fn(Bs, *mut *mut SnInfo) -> c_int,
    length: unsafe extern "C" fn(Bs) -> i64,
    pretty: unsafe extern "C" fn(Err) -> *const c_char,
    error_free: unsafe extern "C" fn(Err),
    last_error: unsafe extern "C" fn(Bs) -> *const c_char,
    outcome: unsafe extern "C" fn(Bs) -> c_int,
}

impl Lib {
    pub fn load(path: &Path) -> R<Lib> {
        let name = CString::new(path_bytes(path)).map_err(|e| e.to_string())?;
        // SAFETY: dlopen of a path that we were given; its initialisers are our own library's.
        let lib = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_LOCAL) };
        if lib.is_null() {
            // SAFETY: dlerror after a failed dlopen gives a C string.
            let why = unsafe { CStr::from_ptr(libc::dlerror()) };
            return Err(format!("{}: {}", path.display(), why.to_string_lossy()));
        }
        macro_rules! symbol {
            ($name:literal) => {{
                // SAFETY: `lib` is open and never closed.
                let p = unsafe { libc::dlsym(lib, concat!($name, "\0").as_ptr().cast()) };
                if p.is_null() {
                    return Err(format!("{} does not export {}", path.display(), $name));
                }
                // SAFETY: the contract gives this symbol the signature of the field.
                unsafe { std::mem::transmute(p) }
            }};
        }
        Ok(Lib {
            open: symbol!("qcow2_open"),
            close: symbol!("qcow2_close"),
            create: symbol!("qcow2_snapshot_create"),
            goto: symbol!("qcow2_snapshot_goto"),
            delete: symbol!("qcow2_snapshot_delete"),
            usage: symbol!("qcow2_snapshot_usage"),
            delete_many: symbol!("qcow2_snapshot_delete_many"),
            list: symbol!("qcow2_snapshot_list"),
            length: symbol!("qcow2_getlength"),
            pretty: symbol!("qcow2_error_get_pretty"),
            error_free: symbol!("qcow2_error_free"),
            last_error: symbol!("qcow2_last_error"),
            outcome: symbol!("qcow2_last_outcome"),
        })
    }

    /// Ask what these snapshots of an image hold, then delete them in one call.
    pub fn many(&self, path: &Path, ids: &[Vec<u8>]) -> R<Result<Usage, Failure>> {
        let c = |b: &[u8]| CString::new(b).map_err(|e| e.to_string());
        let file = c(path_bytes(path))?;
        let ids: Vec<CString> = ids.iter().map(|id| c(id)).collect::<R<_>>()?;
        let array: Vec<*const c_char> = ids.iter().map(|id| id.as_ptr()).collect();
        let (mut bs, mut e): (Bs, Err) = (std::ptr::null_mut(), std::ptr::null_mut());
        let mut usage = Usage::default();
        // SAFETY: C strings, an array of as many as are said, and out-pointers that live through the
        // calls; the handle is closed once.
        let (opened, r) = unsafe {
            let mut r = (self.open)(file.as_ptr(), O_RDWR, &mut bs, &mut e);
            let opened = r == 0;
            if opened {
                r = (self.usage)(bs, array.as_ptr(), array.len(), &mut usage, &mut e);
            }
            if r == 0 {
                r = (self.delete_many)(bs, array.as_ptr(), array.len(), &mut e);
            }
            if opened && (self.close)(bs) != 0 {
                return Err("close failed".into());
            }
            (opened, r)
        };
        if r == 0 {
            return Ok(Ok(usage));
        }
        let text = format!("{} (opened: {opened})", self.take(e));
        Ok(Err(Failure { errno: -r, text }))
    }

    /// The shared library that cargo built together with this test, or `DIFF_LIB`.
    pub fn find() -> R<PathBuf> {
        if let Some(p) = std::env::var_os("DIFF_LIB") {
            return Ok(p.into());
        }
        let exe = std::env::current_exe().map_err(|e| e.to_string())?;
        let dir = exe.parent().ok_or("no directory of the test binary")?;
        for d in [Some(dir), dir.parent()].into_iter().flatten() {
            let p = d.join("libqcow2_snapshot.so");
            if p.exists() {
                return Ok(p);
            }
        }
        Err(format!(
            "no libqcow2_snapshot.so near {} (set DIFF_LIB)",
            exe.display()
        ))
    }

    /// Take the text out of an error object and free it.
    fn take(&self, e: Err) -> String {
        if e.is_null() {
            return "no error object".into();
        }
        // SAFETY: `e` was set by a failed call and is freed once, here.
        unsafe {
            let p = (self.pretty)(e);
            let text = if p.is_null() {
                "(null)".into()
            } else {
                CStr::from_ptr(p).to_string_lossy().into_owned()
            };
            (self.error_free)(e);
            text
        }
    }
}

/// One changing verb, as both sides are asked for it.
#[derive(Clone, Debug)]
pub enum Verb {
    Create {
        name: Vec<u8>,
    },
    Goto {
        what: Vec<u8>,
    },
    /// qemu-img gets `name`; ours gets what qemu-img makes of it.
    Delete {
        name: Vec<u8>,
        id: Option<Vec<u8>>,
        by_name: Option<Vec<u8>>,
    },
}

impl std::fmt::Display for Verb {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let show = |b: &[u8]| {
            let s: String = String::from_utf8_lossy(b).chars().take(40).collect();
            format!(
                "{s:?}{}",
                if b.len() > 40 {
                    format!(" ({} bytes)", b.len())
                } else {
                    String::new()
                }
            )
        };
        match self {
            Verb::Create { name } => write!(f, "create {}", show(name)),
            Verb::Goto { what } => write!(f, "goto {}", show(what)),
            Verb::Delete { name, id, by_name } => write!(
                f,
                "delete {} (ours: id {}, name {})",
                show(name),
                id.as_deref().map_or("NULL".into(), show),
                by_name.as_deref().map_or("NULL".into(), show)
            ),
        }
    }
}

impl Verb {
    /// Run it by qemu-img.
    pub fn by_qemu(&self, tools: &mut Tools, file: &str) -> R<Result<(), Failure>> {
        match self {
            Verb::Create { name } => tools.snapshot("-c", name, file),
            Verb::Goto { what } => tools.snapshot("-a", what, file),
            Verb::Delete { name, .. } => tools.snapshot("-d", name, file),
        }
    }
}

/// What `qcow2_snapshot_list` says of one snapshot.
#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    pub id: Vec<u8>,
    pub name: Vec<u8>,
    pub vm_state_size: u64,
    pub date: (u32, u32),
    pub vm_clock: u64,
    pub icount: u64,
}

/// Our copy of the image and the handle on it, if one is open. Without a library, qemu-img
/// stands in for it and the driver tests itself.
pub struct Side {
    pub path: PathBuf,
    lib: Option<Lib>,
    bs: Bs,
}

pub const O_RDWR: c_int = 2;

impl Side {
    pub fn new(path: PathBuf, lib: Option<Lib>) -> Side {
        Side {
            path,
            lib,
            bs: std::ptr::null_mut(),
        }
    }

    pub fn is_open(&self) -> bool {
        !self.bs.is_null()
    }

    pub fn open(&mut self) -> Result<(), Failure> {
        let Some(lib) = self.lib else { return Ok(()) };
        if self.is_open() {
            return Ok(());
        }
        let path = CString::new(path_bytes(&self.path)).unwrap_or_default();
        let mut e: Err = std::ptr::null_mut();
        // SAFETY: a C string and two out-pointers that live through the call.
        let r = unsafe { (lib.open)(path.as_ptr(), O_RDWR, &mut self.bs, &mut e) };
        if r == 0 && !self.bs.is_null() && e.is_null() {
            return Ok(());
        }
        let text = format!("open: {}", lib.take(e));
        if r >= 0 || !self.bs.is_null() {
            return Err(Failure {
                errno: 0,
                text: format!("open gave {r} with handle {:?}: {text}", self.bs),
            });
        }
        Err(Failure { errno: -r, text })
    }

    pub fn close(&mut self) -> R<()> {
        if let (Some(lib), true) = (self.lib, self.is_open()) {
            // SAFETY: an open handle, forgotten right after.
            let r = unsafe { (lib.close)(self.bs) };
            self.bs = std::ptr::null_mut();
            if r != 0 {
                return Err(format!("close gave {r}"));
            }
        }
        Ok(())
    }

    /// Run a verb on the open handle. `date` is what qemu-img stored.
    pub fn verb(
        &mut self,
        verb: &Verb,
        date: (u32, u32),
        tools: &mut Tools,
        qemu_file: &Path,
    ) -> R<Result<(), Failure>> {
        let Some(lib) = self.lib else {
            let name = self
                .path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let r = verb.by_qemu(tools, &name)?;
            if r.is_ok() && matches!(verb, Verb::Create { .. }) {
                craft::copy_date(qemu_file, &self.path)?;
            }
            return Ok(r);
        };
        if !self.is_open() {
            return Err("verb on a closed handle".into());
        }
        let c = |b: &[u8]| CString::new(b).map_err(|e| e.to_string());
        let mut e: Err = std::ptr::null_mut();
        let mut text = None;
        let r = match verb {
            Verb::Create { name } => {
                // SAFETY: all-zero is a valid value of this plain struct.
                let mut info: SnInfo = unsafe { std::mem::zeroed() };
                for (to, from) in info.name.iter_mut().zip(&name[..name.len().min(255)]) {
                    *to = *from as c_char;
                }
                (info.date_sec, info.date_nsec) = date;
                // SAFETY: an open handle and a struct of the size this handle expects.
                unsafe { (lib.create)(self.bs, &mut info) }
            }
            Verb::Goto { what } => {
                let what = c(what)?;
                // SAFETY: an open handle and a C string.
                unsafe { (lib.goto)(self.bs, what.as_ptr()) }
            }
            Verb::Delete { id, by_name, .. } => {
                let id = id.as_deref().map(c).transpose()?;
                let name = by_name.as_deref().map(c).transpose()?;
                let p = |s: &Option<CString>| s.as_ref().map_or(std::ptr::null(), |s| s.as_ptr());
                // SAFETY: an open handle, C strings or NULL, an error slot that holds NULL.
                let r = unsafe { (lib.delete)(self.bs, p(&id), p(&name), &mut e) };
                if (r < 0) == e.is_null() {
                    return Err(format!("delete gave {r} but its error object is {e:?}"));
                }
                if !e.is_null() {
                    text = Some(lib.take(e));
                }
                r
            }
        };
        if r == 0 {
            return Ok(Ok(()));
        }
        let text = text.unwrap_or_else(|| {
            // SAFETY: an open handle; the text is copied before the next call on it.
            unsafe {
                let p = (lib.last_error)(self.bs);
                if p.is_null() {
                    "no text".into()
                } else {
                    CStr::from_ptr(p).to_string_lossy().into_owned()
                }
            }
        });
        // SAFETY: an open handle.
        let outcome = unsafe { (lib.outcome)(self.bs) };
        Ok(Err(Failure {
            errno: -r,
            text: format!("{text} (returned {r}, outcome {outcome})"),
        }))
    }

    /// The list and the disk size that the handle reports; `None` in self mode.
    pub fn list(&mut self) -> R<Option<(Vec<Listed>, i64)>> {
        let Some(lib) = self.lib else { return Ok(None) };
        let mut tab: *mut SnInfo = std::ptr::null_mut();
        // SAFETY: an open handle and an out-pointer.
        let n = unsafe { (lib.list)(self.bs, &mut tab) };
        if n < 0 {
            return Err(format!("list gave {n}"));
        }
        let mut v = vec![];
        for i in 0..n as usize {
            // SAFETY: the list call gave an array of `n` of these structs.
            let s = unsafe { &*tab.add(i) };
            let text = |b: &[c_char]| {
                b.iter()
                    .take_while(|c| **c != 0)
                    .map(|c| *c as u8)
                    .collect::<Vec<u8>>()
            };
            v.push(Listed {
                id: text(&s.id_str),
                name: text(&s.name),
                vm_state_size: s.vm_state_size,
                date: (s.date_sec, s.date_nsec),
                vm_clock: s.vm_clock_nsec,
                icount: s.icount,
            });
        }
        // SAFETY: one malloc'ed array (or NULL), not used after this.
        unsafe { libc::free(tab.cast()) };
        // SAFETY: an open handle.
        Ok(Some((v, unsafe { (lib.length)(self.bs) })))
    }
}

impl Drop for Side {
    fn drop(&mut self) {
        let _ = self.close();
    }
}
