package main

import (
	"fmt"
	"strconv"

	"causeway/tunnel"

	"github.com/spf13/cobra"
)

// newWireGuardCommand is what an agent starts where the kernel has no WireGuard, and not for people.
func newWireGuardCommand(e *env) *cobra.Command {
	return &cobra.Command{
		Use:     "wireguard DEVICE MTU",
		Short:   "Be a WireGuard device in user space until SIGTERM or until the device is removed",
		Example: "  clustermesh wireguard causeway-wg0 1440",
		Hidden:  true,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) != 2 {
				return usageError("want the device's name and its MTU")
			}
			if n, err := strconv.Atoi(args[1]); err != nil || n < 576 || n > 65535 {
				return usageError("MTU %q: want 576 to 65535 bytes", args[1])
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			mtu, err := strconv.Atoi(args[1])
			if err != nil {
				return fmt.Errorf("MTU: %w", err)
			}
			return tunnel.ServeWireGuard(c.Context(), args[0], mtu, e.err)
		},
	}
}
