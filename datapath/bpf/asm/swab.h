/* BPF has no byte-swap instructions that C code must know of. */
