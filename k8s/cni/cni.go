// Package cni is the plugin by which container runtimes connect pods, as version 1.1.0 of the CNI specification says
// (github.com/containernetworking/cni, SPEC.md). It turns what a runtime asks into a request to the node's agent, and the agent's answer into a result; by itself it
// changes nothing, unless a pod goes while there is no agent.
package cni

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/http"
	"net/netip"
	"os"
	"time"

	"github.com/containernetworking/cni/pkg/skel"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"

	"causeway/agent/api"
)

// Name of the plugin's program: what a network configuration has as its type, and runtimes look for.
const Name = "causeway-cni"

// DefaultPatience is how long the plugin tries again what may become possible: an agent that starts, a pod whose labels have not come yet.
const DefaultPatience = 20 * time.Second

// retryPause is the time between two tries.
const retryPause = 200 * time.Millisecond

// Interface is a pod's network interface as the kernel has it.
type Interface struct {
	MAC string
	MTU int // in bytes
	Up  bool
	// Addresses that it has, less those of the link alone.
	Addresses []netip.Addr
	// Gateways of the default routes by it.
	Gateways []netip.Addr
}

// Plugin answers one call of a container runtime.
type Plugin struct {
	// Version of the program, for the log.
	Version string
	// Patience as DefaultPatience.
	Patience time.Duration
	// Look returns an interface of the network namespace at a path; an error that wraps fs.ErrNotExist says that one of them does not exist.
	Look func(netns, name string) (Interface, error)
	// Remove removes a pod's interface from its network namespace, and the node's end with it. What does not exist needs no removing.
	Remove func(netns, name string) error
}

// Run answers the call that the environment (CNI_COMMAND and so on) and the standard input describe, on the standard output, and returns the code to exit with. Without
// a call it says on the standard error what it is.
func (p *Plugin) Run() int {
	about := fmt.Sprintf("%s %s connects pods to Causeway. Container runtimes call it, as the CNI specification says; docs/cni.md has its configuration.", Name, p.Version)
	refusal := skel.PluginMainFuncsWithError(skel.CNIFuncs{
		Add:    func(args *skel.CmdArgs) error { return p.answer("ADD", args, p.add) },
		Del:    func(args *skel.CmdArgs) error { return p.answer("DEL", args, p.del) },
		Check:  func(args *skel.CmdArgs) error { return p.answer("CHECK", args, p.check) },
		GC:     func(args *skel.CmdArgs) error { return p.answer("GC", args, p.gc) },
		Status: func(args *skel.CmdArgs) error { return p.answer("STATUS", args, p.status) },
	}, version.PluginSupports("0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"), about)
	if refusal == nil {
		return 0
	}
	if err := refusal.Print(); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
	}
	return 1
}

// call is one call that is being answered.
type call struct {
	*skel.CmdArgs
	conf   *Config
	client *api.Client
	log    *slog.Logger
}

// answer decodes what all calls have, lets do answer within the plugin's patience, and logs what came of it.
func (p *Plugin) answer(verb string, args *skel.CmdArgs, do func(context.Context, *call) error) error {
	conf, err := decodeConfig(args.StdinData)
	if err != nil {
		return err
	}
	log, closer := openLog(conf)
	defer closer.Close()
	log = log.With("command", verb, "container", args.ContainerID, "pid", os.Getpid())
	log.Debug("called", "netns", args.Netns, "interface", args.IfName, "args", args.Args, "config", string(args.StdinData), "version", p.Version)
	client := api.NewClient(conf.Socket)
	defer client.Close()
	ctx, cancel := context.WithTimeout(context.Background(), p.Patience)
	defer cancel()
	began := time.Now()
	err = do(ctx, &call{CmdArgs: args, conf: conf, client: client, log: log})
	if err != nil {
		failed := refusal(err)
		log.Error("failed", "code", failed.Code, "error", failed.Error(), "took", time.Since(began))
		return failed
	}
	log.Info("done", "took", time.Since(began))
	return nil
}

// openLog returns the log of the configuration. One that cannot be opened is no reason to leave a pod without a network.
func openLog(conf *Config) (*slog.Logger, io.Closer) {
	discard := io.NopCloser(nil)
	if conf.LogFile == "" {
		return slog.New(slog.DiscardHandler), discard
	}
	file, err := os.OpenFile(conf.LogFile, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		fmt.Fprintf(os.Stderr, "%s: nothing is logged: %v\n", Name, err)
		return slog.New(slog.DiscardHandler), discard
	}
	return slog.New(slog.NewTextHandler(file, &slog.HandlerOptions{Level: conf.level})), file
}

// persist calls do until it succeeds, fails for a reason that time does not change, or ctx ends; then the error is the last reason that was more than that.
func (c *call) persist(ctx context.Context, do func() error) error {
	var why error
	for {
		err := do()
		if err == nil || !passing(err) {
			return err
		}
		if why == nil || ctx.Err() == nil {
			if why == nil || why.Error() != err.Error() {
				c.log.Info("will be tried again", "error", err)
			}
			why = err
		}
		select {
		case <-time.After(retryPause):
		case <-ctx.Done():
			return why
		}
	}
}

// passing tells whether the same request may succeed a little later.
func passing(err error) bool {
	var refused *api.Error
	if errors.As(err, &refused) {
		return codeOf(refused.Status) == types.ErrTryAgainLater
	}
	var known *types.Error
	return !errors.As(err, &known) && !errors.Is(err, fs.ErrPermission)
}

// refusal returns an error with the code that the CNI specification has for it.
func refusal(err error) *types.Error {
	var known *types.Error
	if errors.As(err, &known) {
		return known
	}
	var refused *api.Error
	switch {
	case errors.As(err, &refused):
		return types.NewError(codeOf(refused.Status), refused.Message, "")
	case errors.Is(err, fs.ErrPermission):
		return types.NewError(types.ErrIOFailure, err.Error(), "")
	case errors.Is(err, context.DeadlineExceeded):
		return types.NewError(types.ErrTryAgainLater, "the agent has not answered in time", "see whether it is well: clustermesh status")
	}
	return types.NewError(types.ErrTryAgainLater, err.Error(), "")
}

// codeOf returns the code for an answer of the agent's, by its HTTP status.
func codeOf(status int) uint {
	switch status {
	case http.StatusBadRequest:
		return types.ErrInvalidEnvironmentVariables // the rest of a request does not vary
	case http.StatusNotImplemented: // in no Kubernetes cluster
		return types.ErrInvalidNetworkConfig
	case http.StatusServiceUnavailable, http.StatusNotFound: // not known yet; deleted while it was added
		return types.ErrTryAgainLater
	}
	return types.ErrInternal
}
