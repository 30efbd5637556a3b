/* SPDX-License-Identifier: MIT */
/* The reference cases: replay the operations of c-tests/images/CASE/ops. */
#ifndef CASES_H
#define CASES_H

#include <stdbool.h>

/* Replay the cases named in argv, or all; one line of result for each.
 * `chain`: all operations on one handle; otherwise a handle for each, as qemu-img does. */
int replay_main(int argc, char **argv, bool chain);

#endif
