//! How an image is opened.

use crate::error::{Error, Result};

/// Open flags, with the values of the C header's `QCOW2_O_*` constants.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Default)]
pub struct OpenFlags(u32);

impl OpenFlags {
    /// Open for reading and changing (QEMU's `BDRV_O_RDWR`).
    pub const RDWR: OpenFlags = OpenFlags(0x0002);
    /// Never wait for stable storage (QEMU's `BDRV_O_NO_FLUSH`).
    pub const NO_FLUSH: OpenFlags = OpenFlags(0x0200);
    /// Open an image to check it, however damaged (QEMU's `BDRV_O_CHECK`).
    pub const CHECK: OpenFlags = OpenFlags(0x1000);
    /// Read-only beside a running guest, as qemu-img's `-U`.
    pub const FORCE_SHARE: OpenFlags = OpenFlags(0x0100_0000);
    /// Take no image lock at all.
    pub const NO_LOCK: OpenFlags = OpenFlags(0x0200_0000);
    /// Do not punch holes where clusters are freed.
    pub const NO_DISCARD: OpenFlags = OpenFlags(0x0400_0000);
    /// Behave as the 2014 code in the three ways that the manual names.
    pub const COMPAT_2_1: OpenFlags = OpenFlags(0x0800_0000);
    /// Never open a backing file.
    pub const NO_BACKING: OpenFlags = OpenFlags(0x2000_0000);

    const ALL: u32 = 0x0002
        | 0x0200
        | 0x1000
        | 0x0100_0000
        | 0x0200_0000
        | 0x0400_0000
        | 0x0800_0000
        | 0x2000_0000;

    /// No flag: read-only.
    pub const fn read_only() -> OpenFlags {
        OpenFlags(0)
    }

    /// Check flag bits that come from a caller.
    ///
    /// # Errors
    /// `Invalid` for unknown bits, and for `FORCE_SHARE` together with `RDWR`.
    pub fn from_bits(bits: i32) -> Result<OpenFlags> {
        let bits = bits as u32;
        if bits & !Self::ALL != 0 {
            return Err(Error::Invalid(format!(
                "Unknown open flags {:#x}",
                bits & !Self::ALL
            )));
        }
        let flags = OpenFlags(bits);
        if flags.has(Self::FORCE_SHARE) && flags.has(Self::RDWR) {
            return Err(Error::Invalid(
                "force-share=on can only be used with read-only images".into(),
            ));
        }
        Ok(flags)
    }

    /// The flags for files behind an image: read-only, locked as it is.
    pub(crate) const fn for_layers(self) -> OpenFlags {
        OpenFlags(self.0 & (Self::NO_LOCK.0 | Self::FORCE_SHARE.0))
    }

    /// These flags but for `other`.
    pub(crate) const fn without(self, other: OpenFlags) -> OpenFlags {
        OpenFlags(self.0 & !other.0)
    }

    /// Are all bits of `other` set?
    pub const fn has(self, other: OpenFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl std::ops::BitOr for OpenFlags {
    type Output = OpenFlags;
    fn bitor(self, rhs: OpenFlags) -> OpenFlags {
        OpenFlags(self.0 | rhs.0)
    }
}
