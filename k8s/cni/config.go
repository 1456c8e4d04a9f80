package cni

import (
	"encoding/json"
	"fmt"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containernetworking/cni/pkg/types"

	"causeway/agent/api"
)

// Config is the plugin's object in a network configuration. Of the keys that the CNI specification has, those that ask for what the plugin does not do are refused.
type Config struct {
	types.PluginConf
	// Socket of the node's agent; default api.DefaultSocket.
	Socket string `json:"socket,omitempty"`
	// LogFile that calls are logged to; default: none.
	LogFile string `json:"logFile,omitempty"`
	// LogLevel: debug, info, warn, error; default info.
	LogLevel string `json:"logLevel,omitempty"`
	// IPMasq is the specification's ipMasq.
	IPMasq bool `json:"ipMasq,omitempty"`

	level slog.Level
}

// ours are the keys that may be in the object, besides those that runtimes make, which begin with "cni.dev/".
var ours = []string{"cniVersion", "name", "type", "capabilities", "runtimeConfig", "args", "ipMasq", "ipam", "dns", "prevResult", "socket", "logFile", "logLevel"}

var levels = map[string]slog.Level{"": slog.LevelInfo, "debug": slog.LevelDebug, "info": slog.LevelInfo, "warn": slog.LevelWarn, "error": slog.LevelError}

// decodeConfig returns the plugin's object. Errors are *types.Error.
func decodeConfig(data []byte) (*Config, error) {
	var keys map[string]json.RawMessage
	if err := json.Unmarshal(data, &keys); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration: %v", err), "")
	}
	for _, key := range slices.Sorted(maps.Keys(keys)) {
		if !slices.Contains(ours, key) && !strings.HasPrefix(key, "cni.dev/") {
			return nil, badConfig("unknown key %q: %s knows socket, logFile, logLevel, and the keys of the CNI specification", key, Name)
		}
	}
	conf := new(Config)
	if err := json.Unmarshal(data, conf); err != nil {
		return nil, types.NewError(types.ErrDecodingFailure, fmt.Sprintf("network configuration: %v", err), "")
	}
	return conf, conf.settle()
}

// settle sets defaults, and refuses what cannot be.
func (c *Config) settle() error {
	if c.Socket == "" {
		c.Socket = api.DefaultSocket
	}
	known := false
	if c.level, known = levels[c.LogLevel]; !known {
		return badConfig("logLevel %q: want debug, info, warn or error", c.LogLevel)
	}
	for key, path := range map[string]string{"socket": c.Socket, "logFile": c.LogFile} {
		if path != "" && !filepath.IsAbs(path) {
			return badConfig("%s %q: want an absolute path", key, path)
		}
	}
	for _, capability := range slices.Sorted(maps.Keys(c.Capabilities)) {
		if c.Capabilities[capability] {
			return badConfig("capability %q: %s has none", capability, Name)
		}
	}
	switch {
	case !c.IPAM.IsEmpty():
		return badConfig("ipam %q: addresses are the agent's to give, from the node's pod ranges", c.IPAM.Type)
	case c.IPMasq:
		return badConfig("ipMasq: %s does not masquerade", Name)
	}
	return nil
}

func badConfig(format string, args ...any) error {
	return types.NewError(types.ErrInvalidNetworkConfig, fmt.Sprintf(format, args...), "")
}

// pod is what the kubelet's CNI_ARGS say: whose sandbox it is. Its fields have the names of the arguments.
type pod struct {
	types.CommonArgs
	K8S_POD_NAMESPACE          types.UnmarshallableString
	K8S_POD_NAME               types.UnmarshallableString
	K8S_POD_INFRA_CONTAINER_ID types.UnmarshallableString
	K8S_POD_UID                types.UnmarshallableString
}

// podOf returns whose sandbox CNI_ARGS are about. Errors are *types.Error.
func podOf(args string) (*pod, error) {
	p := new(pod)
	if err := types.LoadArgs(args, p); err != nil {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables, fmt.Sprintf("CNI_ARGS: %v", err), "")
	}
	if p.K8S_POD_NAMESPACE == "" || p.K8S_POD_NAME == "" {
		return nil, types.NewError(types.ErrInvalidEnvironmentVariables,
			fmt.Sprintf("CNI_ARGS %q name no pod", args), "K8S_POD_NAMESPACE and K8S_POD_NAME are missing: only pods of Kubernetes are connected")
	}
	return p, nil
}
