package main

import (
	"strconv"

	"causeway/tunnel"

	"github.com/spf13/cobra"
)

// newWireGuardCommand is what an agent starts where the kernel has no WireGuard, and not for people.
func newWireGuardCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "wireguard DEVICE MTU VXLANPORT",
		Short:   "Be a WireGuard device in user space until SIGTERM or until the device is removed",
		Example: "  clustermesh wireguard causeway-wg0 1440 4789",
		Hidden:  true,
		Args: func(_ *cobra.Command, args []string) error {
			_, _, err := wireGuardArguments(args)
			return err
		},
		RunE: func(c *cobra.Command, args []string) error {
			mtu, port, err := wireGuardArguments(args)
			if err != nil {
				return err
			}
			return tunnel.ServeWireGuard(c.Context(), args[0], mtu, port, e.err)
		},
	}
}

func wireGuardArguments(args []string) (mtu int, port uint16, err error) {
	if len(args) != 3 {
		return 0, 0, usageError("want the device's name, its MTU, and the UDP port of VXLAN")
	}
	if mtu, err = strconv.Atoi(args[1]); err != nil || mtu < 576 || mtu > 65535 {
		return 0, 0, usageError("MTU %q: want 576 to 65535 bytes", args[1])
	}
	n, err := strconv.ParseUint(args[2], 10, 16)
	if err != nil || n == 0 {
		return 0, 0, usageError("VXLAN's port %q: want 1 to 65535", args[2])
	}
	return mtu, uint16(n), nil
}
