/* SPDX-License-Identifier: MIT */
/* After each verb, on a handle of its own, the file equals the one that qemu-img left. */
#include "cases.h"

int main(int argc, char **argv)
{
    return replay_main(argc, argv, false);
}
