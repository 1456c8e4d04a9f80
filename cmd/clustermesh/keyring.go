package main

import (
	"fmt"
	"strings"

	"causeway/agent/api"

	"github.com/spf13/cobra"
)

func newKeyringCommand(e *env) *cobra.Command {
	cmd := family("keyring", "The keys that gossip is encrypted with", `  clustermesh keyring list
  clustermesh keyring add                     a new key, accepted by all nodes
  clustermesh keyring use 1f0c2a9e            all nodes encrypt with it
  clustermesh keyring remove 41d75f0c         and forget the old one`,
		keyringCommand(e, "list", "List the keys by their fingerprints, and how many nodes have them", 0),
		keyringAddCommand(e),
		keyringCommand(e, "use", "Have all nodes encrypt with a key that all of them have", 1),
		keyringCommand(e, "remove", "Have all nodes forget a key that none encrypts with any more", 1))
	cmd.Long = `The keys that gossip is encrypted with, in the whole mesh. To change them without interruption: add a new one, use it
once all nodes have it, remove the old one once none uses it; each step refuses to be too early. Keys have names,
their fingerprints, and are never shown.`
	return cmd
}

func keyringCommand(e *env, action, short string, args int) *cobra.Command {
	use, example := action, "  clustermesh keyring "+action
	if args > 0 {
		use, example = action+" FINGERPRINT", example+" 1f0c2a9e"
	}
	cmd := &cobra.Command{Use: use, Short: short, Example: example, Args: cobra.ExactArgs(args)}
	return withKeyring(e, cmd, func(cmd *cobra.Command, args []string) (api.KeyringRequest, error) {
		return api.KeyringRequest{Action: action, Fingerprint: strings.Join(args, "")}, nil
	})
}

func keyringAddCommand(e *env) *cobra.Command {
	var given bool
	cmd := &cobra.Command{
		Use:   "add",
		Short: "Have all nodes accept a new key too",
		Long:  "Have all nodes accept what is encrypted with a new key too. It is made by the agent, or read from standard input.",
		Example: `  clustermesh keyring add
  head -c 32 /dev/urandom | base64 | clustermesh keyring add --stdin`,
		Args: cobra.NoArgs,
	}
	cmd.Flags().BoolVar(&given, "stdin", false, "read the key, base64 of 32 bytes, from standard input")
	return withKeyring(e, cmd, func(*cobra.Command, []string) (api.KeyringRequest, error) {
		req := api.KeyringRequest{Action: "add"}
		if given {
			if _, err := fmt.Fscan(e.in, &req.Key); err != nil {
				return req, fmt.Errorf("reading the key from standard input: %w", err)
			}
		}
		return req, nil
	})
}

// withKeyring gives a command what all of the keyring's have: -o, and the ring as it is then.
func withKeyring(e *env, cmd *cobra.Command, request func(*cobra.Command, []string) (api.KeyringRequest, error)) *cobra.Command {
	f := formatTable
	outputFlag(cmd, &f)
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		req, err := request(cmd, args)
		if err != nil {
			return err
		}
		c, err := e.client(cmd)
		if err != nil {
			return err
		}
		defer c.Close()
		ring, err := c.Keyring(cmd.Context(), req)
		if err != nil {
			return err
		}
		if f != formatTable {
			return encode(e.out, f, ring, false)
		}
		t := newTable("KEY", "HELD BY", "USED BY", "STATUS")
		for _, k := range ring.Keys {
			status := "accepted"
			if k.Primary {
				status = "encrypts"
			}
			t.add(k.Fingerprint, fmt.Sprintf("%d of %d", k.Held, k.Alive), fmt.Sprintf("%d of %d", k.Used, k.Alive), status)
		}
		e.printer().table(t)
		return nil
	}
	return cmd
}
