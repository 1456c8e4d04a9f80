package main

import (
	"context"
	"encoding/json"
	"fmt"

	"causeway/testbed"

	"github.com/spf13/cobra"
)

func newDemoCommand(e *env) *cobra.Command {
	o := testbed.DemoOptions{}
	f := demoFormat("text")
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Show two clusters as one network on this machine, and take everything down again",
		Long: `Bring up two clusters, east and west, of two nodes each; start servers and clients in pods; declare one
global service "shop" with servers in both clusters; ask it from both sides; remove east's servers and see
west's answer east's clients; bring them back; measure how soon a new endpoint is known in the other
cluster; and take everything down.

Every layer is the real one: etcd, agents, BPF programs, VXLAN in WireGuard between network namespaces. It takes root, and
puts nothing into the machine's own network namespace. Nothing stays, also after Ctrl-C or a
failure; what a killed run has left is removed by the next one.

Exit codes:
  0    everything was shown, and nothing is left
  1    a step failed, or something is left; the error says which
  2    wrong usage
  130  interrupted`,
		Example: `  sudo clustermesh demo
  sudo clustermesh demo --requests 1000 --samples 500
  sudo clustermesh demo -6 --encryption off
  sudo clustermesh demo --output json | jq .propagationMs`,
		Args: cobra.NoArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			if o.Requests < 1 || o.Samples < 1 {
				return usageError("--requests and --samples must be at least 1")
			}
			return e.demo(cmd, o, f)
		},
	}
	cmd.Flags().VarP(&f, "output", "o", "a live account as text, or one object at the end as json")
	cmd.Flags().BoolVarP(&o.IPv6, "ipv6", "6", false, "ask the service at its IPv6 address")
	cmd.Flags().Var((*encryptionFlag)(&o.Encryption), "encryption", "what is encrypted between nodes")
	cmd.Flags().StringVar(&o.Dir, "dir", testbed.DemoDir, "`directory` of the demo's own test-bed")
	cmd.Flags().IntVar(&o.Requests, "requests", 200, "`number` of requests of each client in each phase")
	cmd.Flags().IntVar(&o.Samples, "samples", 200, "`number` of endpoints to measure the propagation of")
	return cmd
}

// demoFormat is the value of the demo's --output.
type demoFormat string

func (f *demoFormat) String() string { return string(*f) }
func (f *demoFormat) Type() string   { return "text|json" }
func (f *demoFormat) Set(s string) error {
	if s != "text" && s != "json" {
		return fmt.Errorf("must be text or json")
	}
	*f = demoFormat(s)
	return nil
}

func (e *env) demo(cmd *cobra.Command, o testbed.DemoOptions, f demoFormat) error {
	account := &account{p: e.printer(), live: e.terminal}
	if f == "text" {
		o.Report = account.step
		defer context.AfterFunc(cmd.Context(), account.interrupted)()
	}
	began := e.now()
	result, err := testbed.Demo(cmd.Context(), o)
	if f == "json" {
		if err := json.NewEncoder(e.out).Encode(result); err != nil {
			return err
		}
	} else if err == nil {
		account.summary(result, e.now().Sub(began))
	}
	if err != nil && cmd.Context().Err() != nil {
		return &exitError{exitInterrupted, fmt.Errorf("interrupted: %w", err)}
	}
	return showLog(cmd, err)
}
