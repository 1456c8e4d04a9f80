package datapath

// The objects are committed, so that using Causeway needs no clang. CI makes them anew with the
// compiler named here, from Debian 12, and fails on a difference.
//
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -type ip_addr bpf bpf/maps.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types pod bpf/pod.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types overlay bpf/overlay.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types underlay bpf/underlay.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types wireguard bpf/wireguard.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types socket bpf/socket.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types proxy bpf/proxy.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -no-global-types outside bpf/outside.c -- -O2 -Wall -Werror -Ibpf
//go:generate go tool bpf2go -cc clang-16 -strip llvm-strip-16 -go-package datapath -target bpfel -type ip_addr fault bpf/fault.c -- -O2 -Wall -Werror -Ibpf
