//! What a storage of a test leaves to its `memory`.

/// The methods of `Storage` with these names, as the memory has them.
macro_rules! pass_on {
    ($($name:ident)*) => { $(pass_on!(@$name);)* };
    (@length) => {
        fn length(&mut self) -> std::io::Result<u64> {
            self.memory.length()
        }
    };
    (@read) => {
        fn read(&mut self, offset: u64, buf: &mut [u8]) -> std::io::Result<()> {
            self.memory.read(offset, buf)
        }
    };
    (@write) => {
        fn write(&mut self, label: &'static str, at: u64, data: &[u8]) -> std::io::Result<()> {
            self.memory.write(label, at, data)
        }
    };
    (@truncate) => {
        fn truncate(&mut self, length: u64) -> std::io::Result<()> {
            self.memory.truncate(length)
        }
    };
    (@discard) => {
        fn discard(&mut self, offset: u64, bytes: u64) -> std::io::Result<()> {
            self.memory.discard(offset, bytes)
        }
    };
    (@barrier) => {
        fn barrier(&mut self) -> std::io::Result<()> {
            self.memory.barrier()
        }
    };
    (@close) => {
        fn close(self: Box<Self>) -> std::io::Result<()> {
            Ok(())
        }
    };
}
