# libqcow2_snapshot: what can be made.
#
#   make          the library and the tool, in build/
#   make library  the library alone
#   make demo     build it and walk through it on a scratch image
#   make check    everything that is tested
#   make quick    format, lints, unit tests, an image of each kind, a crash sweep: one minute
#   make exhaustive  every small image, every cut (40 minutes; PART=i/n: one image in n)
#   make header   make include/qcow2_snapshot.h, man/man3 and the golden texts of tests/abi and tests/package.txt again
#   make bench    time the verbs against qemu-img and the floor (ROUNDS=5 BENCH_DIR=/var/tmp/...)
#   make soak     SECONDS=1800: random images against qemu-img, fresh seeds
#   make soak-crash  every power cut and every failing request, on every image
#   make power    power cuts in a virtual machine, on ext4, xfs and btrfs: at each flush and POWER_CUTS=200 at random (25 minutes; POWER_ARGS)
#   make install  PREFIX=/usr/local DESTDIR= LIBDIR= BINDIR= INCLUDEDIR= MANDIR= DATADIR=
#                 stripped; SO_MODE=644, STRIP=: to keep the symbols; install-debug adds a debug file
#   make uninstall  with the same variables
#   make prefixed PREFIXED=qs_  a static library, and a header, whose functions are called qs_qcow2_...
#   make reproducible  build twice in two folders and compare
#   make package-check  build and try the Debian packages in a Debian 13 root (root, debootstrap)
#   make setup    what the tests need and this machine lacks (check does it by itself)
#   make nbdkit   the plugin in integrations/nbdkit, into build/; make nbdkit-check tests it
#   make python-wheel  a wheel of bindings/python that carries the library, in build/wheel
#   make python-check  the tests of bindings/python (PYTHONS='python3 ...')
#   make clean

CARGO  ?= cargo
CC     ?= cc
# What a packager has set goes into the build of libzstd; the default is for the test programs.
BUILD_CFLAGS := $(CFLAGS)
CFLAGS ?= -O1 -g
PREFIX ?= /usr/local
BINDIR ?= $(PREFIX)/bin
LIBDIR ?= $(PREFIX)/lib
INCLUDEDIR ?= $(PREFIX)/include
DATADIR ?= $(PREFIX)/share
MANDIR ?= $(DATADIR)/man

# A mode for the shared library (755 where the system wants it), and what strips; STRIP=: keeps it all.
SO_MODE ?= 644
STRIP   ?= strip

# Cargo's own variable, so that a caller may keep the artefacts elsewhere.
TARGET  := $(or $(CARGO_TARGET_DIR),target)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libqcow2_snapshot.so.0
HEADER  := include/qcow2_snapshot.h

# What is built names no folder of this machine, so that two builds give equal files (make reproducible).
CARGO_HOME_ := $(or $(CARGO_HOME),$(HOME)/.cargo)
REPRODUCIBLE = CC='$(CC)' RUSTFLAGS='$(RUSTFLAGS) --remap-path-prefix=$(CURDIR)=. --remap-path-prefix=$(CARGO_HOME_)=/cargo' \
	CFLAGS='$(BUILD_CFLAGS) -ffile-prefix-map=$(CURDIR)=. -ffile-prefix-map=$(CARGO_HOME_)=/cargo'

.PHONY: power fuzz soak-hostile asan tsan miri all library tool demo check quick exhaustive c-check header bench soak soak-crash install uninstall \
	install-smoke python-example python-wheel python-check nbdkit nbdkit-check \
	install-debug prefixed prefixed-check reproducible package-check abi-check setup clean

all: library tool

# Cargo knows what is up to date, so it is always asked. Only the static library, for only by
# itself is it optimised across crates (no LTO beside an rlib). The shared library is linked from
# it, with symbol versions, which Cargo cannot do; build/ has new dates only where something is new.
library:
	$(REPRODUCIBLE) $(CARGO) rustc --release --lib -p qcow2-snapshot --crate-type staticlib --target-dir '$(TARGET)'
	@mkdir -p build
	@cmp -s '$(TARGET)/release/libqcow2_snapshot.a' build/libqcow2_snapshot.a || \
	    cp '$(TARGET)/release/libqcow2_snapshot.a' build/libqcow2_snapshot.a
	@for file in build/libqcow2_snapshot.a src/libqcow2_snapshot.map tools/link-shared; do \
	    [ build/libqcow2_snapshot.so -nt $$file ] || touch build/.relink; done
	@[ ! -e build/.relink ] || \
	    { CC='$(CC)' tools/link-shared build/libqcow2_snapshot.a build/libqcow2_snapshot.so && \
	    rm -f build/.relink; }
	@ln -sf libqcow2_snapshot.so build/$(SONAME)
	@$(call pc_file,$${pcfiledir}/..,$${pcfiledir},$${prefix}/include) > build/qcow2_snapshot.pc

# The tool is Rust through and through: it does not need the shared library.
tool:
	$(REPRODUCIBLE) $(CARGO) build --release -p qcow2-snapshot-tool --target-dir '$(TARGET)'
	@mkdir -p build/completions
	@cmp -s '$(TARGET)/release/qcow2-snapshot' build/qcow2-snapshot || \
	    cp '$(TARGET)/release/qcow2-snapshot' build/qcow2-snapshot
	@build/qcow2-snapshot completions bash > build/completions/qcow2-snapshot
	@build/qcow2-snapshot completions zsh > build/completions/_qcow2-snapshot
	@build/qcow2-snapshot completions fish > build/completions/qcow2-snapshot.fish

# $(call pc_file,PREFIX,LIBDIR,INCLUDEDIR), the folders by ${prefix} where they are below it. The private libraries are what rustc names for a static
# library (--print native-static-libs), without two that every C compiler adds itself, last and
# in the right form: -lc and -lgcc_s (which does not exist for "cc -static": there it is
# -lgcc_eh). tests/install.sh compares.
pc_file = printf '%s\n' \
	'prefix=$(1)' 'libdir=$(call below,$(1),$(2))' 'includedir=$(call below,$(1),$(3))' '' \
	'Name: qcow2_snapshot' \
	'Description: internal snapshots of qcow2 images, as QEMU makes them' \
	'Version: $(VERSION)' \
	'Cflags: -I$${includedir}' \
	'Libs: -L$${libdir} -lqcow2_snapshot' \
	'Libs.private: $(PRIVATE_LIBS)'
below = $(patsubst $(1)/%,$${prefix}/%,$(2))
PRIVATE_LIBS := -lutil -lrt -lpthread -lm -ldl

build/demo build/list build/export-snapshot build/incremental: build/%: examples/%.c $(HEADER) | library
	$(CC) -std=c99 -Wall -Wextra -Wpedantic $(CFLAGS) -Iinclude -o $@ $< \
	    -Lbuild -lqcow2_snapshot -Wl,-rpath,'$$ORIGIN'

# The program is linked against the library by name, so a new library needs no new program.
demo: all build/demo build/list build/export-snapshot build/incremental
	@echo
	@build/demo build/demo.qcow2
	@echo
	@echo '$$ build/list build/demo.qcow2'
	@build/list build/demo.qcow2
	@echo
	@echo '$$ build/qcow2-snapshot diff build/demo.qcow2 tuesday'
	@build/qcow2-snapshot diff build/demo.qcow2 tuesday
	@echo '$$ build/qcow2-snapshot du build/demo.qcow2'
	@build/qcow2-snapshot du build/demo.qcow2

check: setup
	@CARGO='$(CARGO)' TARGET='$(TARGET)' MAKE='$(MAKE)' tools/check

quick:
	@CARGO='$(CARGO)' CARGO_TARGET_DIR='$(TARGET)' tools/quick

PART ?= 0/1
exhaustive:
	EXHAUSTIVE=hour EXHAUSTIVE_PART=$(PART) $(CARGO) test --release --test exhaustive --target-dir '$(TARGET)' \
	    every_small_image -- --nocapture

c-check: library
	$(MAKE) -C c-tests check LIBDIR=../build INCDIR=../include

# The tests that compare write instead. One after the other: each begins with what the one before wrote.
header:
	for tests in '--test header' '--test abi -- the_shared_library_exports' '--test abi --test man --test package'; do \
	    QCOW2_BLESS=1 $(CARGO) test --quiet --target-dir '$(TARGET)' $$tests || exit; done

# The library, three programs in C, and a page with what they measured.
ROUNDS ?= 5
BENCH_DIR ?= /var/tmp/qcow2-bench
bench: setup library tool
	@mkdir -p build/bench
	$(CC) -std=c99 -O2 -Wall -Wextra -o build/bench/genimage benches/genimage.c
	$(CC) -std=c99 -O2 -Wall -Wextra -o build/bench/floor benches/floor.c
	$(CC) -std=c99 -O2 -Wall -Wextra -Iinclude -o build/bench/ours benches/ours.c \
	    -Lbuild -lqcow2_snapshot -Wl,-rpath,'$$ORIGIN/..'
	@! pkg-config --exists nbdkit || $(MAKE) --no-print-directory nbdkit
	python3 benches/bench.py build/bench docs/performance.md --dir '$(BENCH_DIR)' --rounds $(ROUNDS) $(BENCH_ARGS)

SECONDS ?= 1800
soak: setup
	DIFF_SECONDS=$(SECONDS) $(CARGO) test --release --test differential --target-dir '$(TARGET)'
	DIFF_SETS=12 DIFF_SECONDS=$(SECONDS) $(CARGO) test --release --test differential --target-dir '$(TARGET)'
	READS_CHANGES=1 READS_SECONDS=$(SECONDS) $(CARGO) test --release --test reads --target-dir '$(TARGET)' disks -- --nocapture
	EXPORT_SECONDS=$(SECONDS) $(CARGO) test --release -p qcow2-snapshot-tool --test chain --target-dir '$(TARGET)' -- --nocapture
	EXPORT_FUZZ_SECONDS=$(SECONDS) $(CARGO) test --release -p qcow2-snapshot-tool --test hostile --target-dir '$(TARGET)' -- --nocapture
	FLATTEN_SECONDS=$(SECONDS) $(CARGO) test --release --test flatten every_state_of_random --target-dir '$(TARGET)' -- --nocapture

soak-crash: setup
	CRASH_ALL=1 $(CARGO) test --release --test crash --target-dir '$(TARGET)' -- --nocapture
	CRASH_ALL=1 $(CARGO) test --release --test flatten crash:: --target-dir '$(TARGET)' -- --nocapture

# The real tool in a virtual machine whose disk loses power (docs/crash-safety.md). POWER_ROOT: a Debian root with QEMU, a
# kernel and mkfs (made if it is not there, as root). Then two disks without barriers, on which losses must be found.
POWER_CUTS ?= 200
POWER = python3 tests/power/power.py $(POWER_ARGS)
power: tool
	@if ! command -v python3 > /dev/null; then echo 'SKIPPED: no python3 here: no power cut was tried'; exit 0; fi; \
	$(POWER) --cuts $(POWER_CUTS) build/qcow2-snapshot && \
	$(POWER) --cuts 60 --drop-flushes build/qcow2-snapshot ext4 && \
	$(CC) -shared -fPIC -o build/nobarrier.so tests/power/nobarrier.c && \
	$(POWER) --cuts 60 --preload build/nobarrier.so build/qcow2-snapshot ext4

# A long run of one fuzz target (nightly Rust, cargo-fuzz); hostile images beside qemu-img; sanitizers.
FUZZ_TARGET ?= verbs
FUZZ_RUNS ?= 2000000
HOSTILE_SECONDS ?= 600
FUZZ_SANITIZER ?= none
FUZZ_RSS := $(if $(filter none,$(FUZZ_SANITIZER)),512,4096)
# Memory is kept from run to run; memcmp of nothing must not be slow (AVX-512 with an empty mask).
FUZZ_TUNABLES := glibc.malloc.mmap_threshold=1073741824:glibc.malloc.trim_threshold=2147483648:glibc.cpu.hwcaps=-AVX512VL,-AVX512BW,-AVX512F
fuzz:
	python3 fuzz/seeds.py fuzz/corpus/seeds
	mkdir -p fuzz/corpus/$(FUZZ_TARGET)
	cd fuzz && $(CARGO) +nightly fuzz build --sanitizer $(FUZZ_SANITIZER) --no-trace-compares
	cd fuzz && GLIBC_TUNABLES=$(FUZZ_TUNABLES) $(CARGO) +nightly fuzz run --sanitizer $(FUZZ_SANITIZER) \
	    --no-trace-compares $(FUZZ_TARGET) corpus/$(FUZZ_TARGET) corpus/seeds -- \
	    -runs=$(FUZZ_RUNS) -max_len=20000 -timeout=10 -rss_limit_mb=$(FUZZ_RSS)

soak-hostile: setup
	HOSTILE_SECONDS=$(HOSTILE_SECONDS) $(CARGO) test --test hostile --target-dir '$(TARGET)' -- --nocapture

asan:
	tools/sanitize address
tsan:
	tools/sanitize thread
miri:
	tools/sanitize miri

# "make && sudo make install" must not need root to have Cargo, nor leave root's files among
# the user's: what is built is taken as it is then.
install:
	@if [ -f build/libqcow2_snapshot.so ] && [ -f build/qcow2-snapshot ] && \
	    { [ ! -O build ] || ! command -v '$(CARGO)' > /dev/null; }; \
	then echo 'Installing what is in build/.'; else $(MAKE) --no-print-directory all; fi
	install -d '$(DESTDIR)$(LIBDIR)/pkgconfig' '$(DESTDIR)$(INCLUDEDIR)' '$(DESTDIR)$(BINDIR)' \
	    '$(DESTDIR)$(MANDIR)/man1' '$(DESTDIR)$(MANDIR)/man3' $(COMPLETIONS:%='$(DESTDIR)$(DATADIR)/%')
	install -m $(SO_MODE) build/libqcow2_snapshot.so '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so.$(VERSION)'
	$(STRIP) --strip-unneeded '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so.$(VERSION)'
	ln -sf libqcow2_snapshot.so.$(VERSION) '$(DESTDIR)$(LIBDIR)/$(SONAME)'
	ln -sf $(SONAME) '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so'
	install -m 644 build/libqcow2_snapshot.a '$(DESTDIR)$(LIBDIR)'
	$(STRIP) --strip-debug '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.a'
	@$(call pc_file,$(PREFIX),$(LIBDIR),$(INCLUDEDIR)) > '$(DESTDIR)$(LIBDIR)/pkgconfig/qcow2_snapshot.pc'
	chmod 644 '$(DESTDIR)$(LIBDIR)/pkgconfig/qcow2_snapshot.pc'
	install -m 644 $(HEADER) '$(DESTDIR)$(INCLUDEDIR)'
	install -m 755 build/qcow2-snapshot '$(DESTDIR)$(BINDIR)'
	$(STRIP) '$(DESTDIR)$(BINDIR)/qcow2-snapshot'
	install -m 644 tool/qcow2-snapshot.1 '$(DESTDIR)$(MANDIR)/man1'
	install -m 644 man/man3/*.3 '$(DESTDIR)$(MANDIR)/man3'
	install -m 644 build/completions/qcow2-snapshot '$(DESTDIR)$(DATADIR)/bash-completion/completions'
	install -m 644 build/completions/_qcow2-snapshot '$(DESTDIR)$(DATADIR)/zsh/site-functions'
	install -m 644 build/completions/qcow2-snapshot.fish '$(DESTDIR)$(DATADIR)/fish/vendor_completions.d'
	@[ -n '$(DESTDIR)' ] || echo 'If programs do not find $(SONAME) now: "sudo ldconfig", or LD_LIBRARY_PATH=$(LIBDIR)'

COMPLETIONS := bash-completion/completions zsh/site-functions fish/vendor_completions.d

# The same, and for debuggers what was stripped, where gdb looks for it.
DEBUGDIR = $(DESTDIR)$(LIBDIR)/debug$(LIBDIR)
install-debug: install
	install -d '$(DEBUGDIR)'
	objcopy --only-keep-debug build/libqcow2_snapshot.so '$(DEBUGDIR)/libqcow2_snapshot.so.$(VERSION).debug'
	objcopy --add-gnu-debuglink='$(DEBUGDIR)/libqcow2_snapshot.so.$(VERSION).debug' \
	    '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so.$(VERSION)'

# Only what install made; folders stay, they may be anybody's.
uninstall:
	rm -f '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so' '$(DESTDIR)$(LIBDIR)/$(SONAME)' \
	    '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so.$(VERSION)' '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.a' \
	    '$(DEBUGDIR)/libqcow2_snapshot.so.$(VERSION).debug' \
	    '$(DESTDIR)$(LIBDIR)/pkgconfig/qcow2_snapshot.pc' '$(DESTDIR)$(INCLUDEDIR)/qcow2_snapshot.h' \
	    '$(DESTDIR)$(BINDIR)/qcow2-snapshot' '$(DESTDIR)$(MANDIR)/man1/qcow2-snapshot.1' \
	    $(patsubst man/%,'$(DESTDIR)$(MANDIR)/%',$(wildcard man/man3/*.3)) \
	    '$(DESTDIR)$(DATADIR)/bash-completion/completions/qcow2-snapshot' \
	    '$(DESTDIR)$(DATADIR)/zsh/site-functions/_qcow2-snapshot' \
	    '$(DESTDIR)$(DATADIR)/fish/vendor_completions.d/qcow2-snapshot.fish'

# Install into a scratch folder, and build and run programs against what is there.
install-smoke: all
	@CC='$(CC)' CARGO='$(CARGO)' MAKE='$(MAKE)' CARGO_TARGET_DIR='$(TARGET)' tests/install.sh

# The library from Python, against what the example in C says of the same image.
python-example: demo
	@if command -v python3 > /dev/null; then \
	    python3 examples/list.py build/libqcow2_snapshot.so build/demo.qcow2 > build/list.py.out && \
	    build/list build/demo.qcow2 | diff - build/list.py.out && echo 'list.py says what list.c says'; \
	else echo 'SKIPPED: no python3 here: examples/list.py was not run'; fi

# For programs that have QEMU's functions themselves: the same library under other names.
PREFIXED ?= qs_
prefixed: library
	@nm --defined-only -g build/libqcow2_snapshot.a 2> /dev/null | \
	    sed -n 's/.* [TDR] \(qcow2_[a-z0-9_]*\)$$/\1 $(PREFIXED)\1/p' | sort -u > build/prefixed.syms
	objcopy --redefine-syms=build/prefixed.syms build/libqcow2_snapshot.a build/lib$(PREFIXED)qcow2_snapshot.a
	sed 's/\<qcow2_\([a-z0-9_]*\)(/$(PREFIXED)qcow2_\1(/' $(HEADER) > build/$(PREFIXED)qcow2_snapshot.h

prefixed-check: prefixed
	@CC='$(CC)' PREFIXED='$(PREFIXED)' tests/prefixed.sh

reproducible:
	@CARGO='$(CARGO)' MAKE='$(MAKE)' tests/reproducible.sh

# What abidiff says of the library beside the committed description of its interface.
abi-check:
	@tests/abidiff.sh

package-check:
	@packaging/check

nbdkit: library
	@$(MAKE) --no-print-directory -C integrations/nbdkit

nbdkit-check: library
	@if pkg-config --exists nbdkit; then $(MAKE) --no-print-directory -C integrations/nbdkit all check; \
	else echo "SKIPPED: no nbdkit headers here: integrations/nbdkit was neither built nor tested"; fi

# No network: Python's setuptools and wheel must be there (Debian: python3-setuptools, python3-wheel).
PYTHON ?= python3
python-wheel: library
	rm -rf build/python build/wheel && mkdir -p build/python
	cp -r bindings/python/pyproject.toml bindings/python/setup.py bindings/python/README.md \
	    bindings/python/src build/python
	cp -L build/libqcow2_snapshot.so build/python/src/qcow2_snapshot/$(SONAME)
	strip --strip-debug build/python/src/qcow2_snapshot/$(SONAME)
	$(PYTHON) -m pip wheel --quiet --disable-pip-version-check --no-index --no-deps --no-build-isolation \
	    --wheel-dir build/wheel ./build/python
	@ls build/wheel/*.whl

python-check: library
	@tools/python-check

setup:
	@tools/setup

clean:
	$(CARGO) clean --target-dir '$(TARGET)'
	rm -rf build
