# libqcow2_snapshot: what can be made.
#
#   make          the library, in build/
#   make demo     build it and walk through it on a scratch image
#   make check    everything that is tested
#   make header   make include/qcow2_snapshot.h and the golden texts of tests/abi again
#   make bench    time the verbs against qemu-img and the floor (ROUNDS=5 BENCH_DIR=/var/tmp/...)
#   make soak     SECONDS=1800: random images against qemu-img, fresh seeds
#   make soak-crash  every power cut and every failing request, on every image
#   make install  PREFIX=/usr/local DESTDIR= LIBDIR=...
#   make setup    what the tests need and this machine lacks (check does it by itself)
#   make clean

CARGO  ?= cargo
CC     ?= cc
CFLAGS ?= -O1 -g
PREFIX ?= /usr/local
LIBDIR ?= $(PREFIX)/lib

# Cargo's own variable, so that a caller may keep the artefacts elsewhere.
TARGET  := $(or $(CARGO_TARGET_DIR),target)
VERSION := $(shell sed -n 's/^version = "\(.*\)"/\1/p' Cargo.toml | head -n 1)
SONAME  := libqcow2_snapshot.so.0
HEADER  := include/qcow2_snapshot.h

.PHONY: all library demo check c-check header bench soak soak-crash install setup clean

all: library

# Cargo knows what is up to date, so it is always asked.
library:
	$(CARGO) build --release --lib --target-dir '$(TARGET)'
	@mkdir -p build
	@cmp -s '$(TARGET)/release/libqcow2_snapshot.so' build/libqcow2_snapshot.so || \
	    cp '$(TARGET)/release/libqcow2_snapshot.so' build/libqcow2_snapshot.so
	@cmp -s '$(TARGET)/release/libqcow2_snapshot.a' build/libqcow2_snapshot.a || \
	    cp '$(TARGET)/release/libqcow2_snapshot.a' build/libqcow2_snapshot.a
	@ln -sf libqcow2_snapshot.so build/$(SONAME)
	@$(call pc_file,$${pcfiledir},$${pcfiledir}/../include) > build/qcow2_snapshot.pc

# $(call pc_file,LIBDIR,INCLUDEDIR)
pc_file = printf '%s\n' \
	'libdir=$(1)' 'includedir=$(2)' '' \
	'Name: qcow2_snapshot' \
	'Description: internal snapshots of qcow2 images, as QEMU makes them' \
	'Version: $(VERSION)' \
	'Cflags: -I$${includedir}' \
	'Libs: -L$${libdir} -lqcow2_snapshot' \
	'Libs.private: -lgcc_s -lpthread -ldl -lm'

build/demo build/list build/export-snapshot: build/%: examples/%.c $(HEADER) | library
	$(CC) -std=c99 -Wall -Wextra -Wpedantic $(CFLAGS) -Iinclude -o $@ $< \
	    -Lbuild -lqcow2_snapshot -Wl,-rpath,'$$ORIGIN'

# The program is linked against the library by name, so a new library needs no new program.
demo: library build/demo build/list build/export-snapshot
	@echo
	@build/demo build/demo.qcow2
	@echo
	@echo '$$ build/list build/demo.qcow2'
	@build/list build/demo.qcow2

check: setup library
	@CARGO='$(CARGO)' TARGET='$(TARGET)' MAKE='$(MAKE)' tools/check

c-check: library
	$(MAKE) -C c-tests check LIBDIR=../build INCDIR=../include

# The tests that compare write instead.
header:
	QCOW2_BLESS=1 $(CARGO) test --quiet --test header --test abi --target-dir '$(TARGET)'

# The library, three programs in C, and a page with what they measured.
ROUNDS ?= 5
BENCH_DIR ?= /var/tmp/qcow2-bench
bench: setup library
	@mkdir -p build/bench
	$(CC) -std=c99 -O2 -Wall -Wextra -o build/bench/genimage benches/genimage.c
	$(CC) -std=c99 -O2 -Wall -Wextra -o build/bench/floor benches/floor.c
	$(CC) -std=c99 -O2 -Wall -Wextra -Iinclude -o build/bench/ours benches/ours.c \
	    -Lbuild -lqcow2_snapshot -Wl,-rpath,'$$ORIGIN/..'
	python3 benches/bench.py build/bench docs/performance.md --dir '$(BENCH_DIR)' --rounds $(ROUNDS) $(BENCH_ARGS)

SECONDS ?= 1800
soak: setup
	DIFF_SECONDS=$(SECONDS) $(CARGO) test --release --test differential --target-dir '$(TARGET)'

soak-crash: setup
	CRASH_ALL=1 $(CARGO) test --release --test crash --target-dir '$(TARGET)' -- --nocapture

install: library
	install -D -m 755 build/libqcow2_snapshot.so '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so.$(VERSION)'
	ln -sf libqcow2_snapshot.so.$(VERSION) '$(DESTDIR)$(LIBDIR)/$(SONAME)'
	ln -sf $(SONAME) '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.so'
	install -D -m 644 build/libqcow2_snapshot.a '$(DESTDIR)$(LIBDIR)/libqcow2_snapshot.a'
	install -D -m 644 $(HEADER) '$(DESTDIR)$(PREFIX)/include/qcow2_snapshot.h'
	mkdir -p '$(DESTDIR)$(LIBDIR)/pkgconfig'
	$(call pc_file,$(LIBDIR),$(PREFIX)/include) > '$(DESTDIR)$(LIBDIR)/pkgconfig/qcow2_snapshot.pc'

setup:
	@tools/setup

clean:
	$(CARGO) clean --target-dir '$(TARGET)'
	rm -rf build
