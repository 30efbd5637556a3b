/* SPDX-License-Identifier: MIT */
/* A chain of verbs on one handle leaves, after each, what a chain of qemu-img runs leaves. */
#include "cases.h"

int main(int argc, char **argv)
{
    return replay_main(argc, argv, true);
}
