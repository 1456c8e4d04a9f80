package main

import (
	"os"

	"causeway/agent/api"
	"causeway/testbed"

	"github.com/spf13/cobra"
)

// testbedSockets finds the agents of a test-bed.
type testbedSockets interface {
	// SocketOf returns the socket of the agent on a node, CLUSTER/NODE, of the test-bed in dir.
	SocketOf(dir, node string) (string, error)
	// SocketHere returns the socket of the test-bed node whose network namespace this process is
	// in; false if it is in none.
	SocketHere() (string, bool)
	// Nodes lists the nodes, CLUSTER/NODE, of the test-bed in dir; none if none is up.
	Nodes(dir string) []string
}

func addSocketFlags(root *cobra.Command, e *env) {
	flags := root.PersistentFlags()
	flags.String("node", "", "ask the agent of this node of the test-bed, `CLUSTER/NODE`")
	flags.String("dir", "", "the test-bed's `directory`, for --node (default: the default test-bed's)")
	flags.String("socket", "", "the agent's unix socket, a `path` (default $"+api.SocketEnv+", else "+api.DefaultSocket+", else the test-bed node's that this runs in)")
	_ = root.RegisterFlagCompletionFunc("node", e.completeNodes)
}

// client returns a client for the agent that the flags and the environment name.
func (e *env) client(cmd *cobra.Command) (*api.Client, error) {
	socket, err := e.socket(cmd)
	if err != nil {
		return nil, err
	}
	return e.connect(socket), nil
}

// socket returns whose socket to ask: what was said on the command line, then the environment, then
// this machine's agent, then the agent of the test-bed node that this process runs in.
func (e *env) socket(cmd *cobra.Command) (string, error) {
	node, _ := cmd.Flags().GetString("node")
	dir, _ := cmd.Flags().GetString("dir")
	socket, _ := cmd.Flags().GetString("socket")
	switch {
	case node != "" && socket != "":
		return "", usageError("--node and --socket both name an agent: give one of them")
	case socket != "":
		return socket, nil
	case node != "":
		socket, err := e.testbed.SocketOf(dir, node)
		if err != nil {
			return "", &exitError{exitNotAsked, err}
		}
		return socket, nil
	}
	if socket := e.getenv(api.SocketEnv); socket != "" {
		return socket, nil
	}
	if _, err := os.Stat(api.DefaultSocket); err == nil {
		return api.DefaultSocket, nil
	}
	if socket, ok := e.testbed.SocketHere(); ok {
		return socket, nil
	}
	return "", usageError("no agent is running on this machine: name one with --socket PATH, or with --node CLUSTER/NODE if a test-bed is up")
}

// localTestbed finds the agents of test-beds on this machine.
type localTestbed struct{}

func (localTestbed) SocketOf(dir, node string) (string, error) { return testbed.SocketOf(dir, node) }
func (localTestbed) SocketHere() (string, bool)                { return testbed.SocketHere() }

func (localTestbed) Nodes(dir string) (nodes []string) {
	dirs := []string{dir}
	if dir == "" { // where SocketOf looks then
		dirs = []string{testbed.DefaultDir, testbed.DemoDir}
	}
	for _, dir := range dirs {
		bed, err := testbed.Open(dir)
		if err != nil {
			continue
		}
		s, err := bed.State()
		if err != nil {
			continue
		}
		for _, c := range s.Clusters {
			for _, n := range c.Nodes {
				nodes = append(nodes, c.Name+"/"+n.Name)
			}
		}
		break
	}
	return nodes
}
