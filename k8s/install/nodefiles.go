package install

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"causeway/identity/pki"
)

const (
	// pluginName is that of the CNI plugin's program, and the type of its object in a network configuration.
	pluginName = "causeway-cni"
	// configName is that of the network configuration: runtimes take the first one by name.
	configName = "05-causeway.conflist"
	// configVersion is the CNI specification's that the configuration is of, which all runtimes of today know.
	configVersion = "1.0.0"
)

// NodeFiles are what a node has of an installation beside its pods.
type NodeFiles struct {
	// Mode is ModeCNI or ModeChained.
	Mode string
	// Authority is a directory with ca.crt and ca.key, PKI the one that gets the agent's certificate.
	Authority, PKI string
	// BinDir and ConfDir are the container runtime's for CNI plugins and network configurations.
	BinDir, ConfDir string
	// Program becomes the plugin: one that knows what to do when it is called by the plugin's name.
	Program string
}

// PrepareNode makes a node ready for its agent: the agent's certificate, the CNI plugin, and last the network configuration, after which the node counts as having a network. Each file
// is complete or as it was before, whenever it is read. Doing it again changes nothing.
func PrepareNode(f NodeFiles, now time.Time) error {
	authority, err := readAuthority(f.Authority)
	if err != nil {
		return err
	}
	if err := pki.EnsureAgent(f.PKI, authority, now); err != nil {
		return err
	}
	config, err := f.config()
	if err != nil {
		return err
	}
	if err := placeProgram(f.Program, filepath.Join(f.BinDir, pluginName)); err != nil {
		return fmt.Errorf("prepare node: the CNI plugin: %w", err)
	}
	if err := place(filepath.Join(f.ConfDir, configName), bytes.NewReader(config), 0o644); err != nil {
		return fmt.Errorf("prepare node: the network configuration: %w", err)
	}
	return nil
}

// UndoNode removes the network configuration and then the plugin. The agent's state stays.
func UndoNode(f NodeFiles) error {
	for _, name := range []string{filepath.Join(f.ConfDir, configName), filepath.Join(f.BinDir, pluginName)} {
		if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("undo node: %w", err)
		}
	}
	return nil
}

// readAuthority reads what a Secret has as a volume. Modes are the kubelet's to keep.
func readAuthority(dir string) (*pki.Authority, error) {
	var read [2][]byte
	for i, name := range []string{authorityCert, authorityKey} {
		content, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			return nil, fmt.Errorf("prepare node: the cluster's authority: %w: the Secret %s must have %s and %s", err, AuthorityName, authorityCert, authorityKey)
		}
		read[i] = content
	}
	authority, err := pki.ParseAuthority(read[0], read[1])
	if err != nil {
		return nil, fmt.Errorf("prepare node: %s: %w", dir, err)
	}
	return authority, nil
}

// config returns the network configuration: the plugin alone, or after those of the first configuration that is somebody else's.
func (f NodeFiles) config() ([]byte, error) {
	plugin := map[string]any{"type": pluginName}
	if f.Mode == ModeCNI {
		return networkConfig(map[string]any{"cniVersion": configVersion, "name": "causeway", "plugins": []any{plugin}})
	}
	entries, err := os.ReadDir(f.ConfDir)
	if err != nil {
		return nil, fmt.Errorf("prepare node: %w", err)
	}
	for _, e := range entries { // sorted, as runtimes take them
		if e.Name() == configName || !slices.Contains([]string{".conf", ".conflist", ".json"}, filepath.Ext(e.Name())) || strings.HasPrefix(e.Name(), ".") {
			continue
		}
		name := filepath.Join(f.ConfDir, e.Name())
		text, err := os.ReadFile(name)
		if err != nil {
			return nil, fmt.Errorf("prepare node: %w", err)
		}
		return chain(name, text, plugin)
	}
	return nil, fmt.Errorf("prepare node: there is no network configuration in %s to be chained behind: wait for the other CNI plugin's, or install with --mode %s", f.ConfDir, ModeCNI)
}

// chain adds a plugin to a configuration, which may be that of a single plugin.
func chain(file string, text []byte, plugin map[string]any) ([]byte, error) {
	var config map[string]any
	if err := json.Unmarshal(text, &config); err != nil {
		return nil, fmt.Errorf("prepare node: %s is no network configuration: %w", file, err)
	}
	plugins, isList := config["plugins"].([]any)
	if !isList {
		if config["type"] == nil {
			return nil, fmt.Errorf("prepare node: %s has neither plugins nor a type", file)
		}
		plugins = []any{config}
		config = map[string]any{"cniVersion": config["cniVersion"], "name": config["name"]}
	}
	config["plugins"] = append(plugins, plugin)
	return networkConfig(config)
}

func networkConfig(config map[string]any) ([]byte, error) {
	text, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return nil, fmt.Errorf("prepare node: %w", err)
	}
	return append(text, '\n'), nil
}

// placeProgram copies a program, unless it is there.
func placeProgram(from, to string) error {
	if same(from, to) {
		return nil
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	return place(to, f, 0o755)
}

func same(a, b string) bool {
	x, err := os.Open(a)
	if err != nil {
		return false
	}
	defer x.Close()
	y, err := os.Open(b)
	if err != nil {
		return false
	}
	defer y.Close()
	left, right := make([]byte, 1<<20), make([]byte, 1<<20)
	for {
		n, errX := io.ReadFull(x, left)
		m, errY := io.ReadFull(y, right)
		if !bytes.Equal(left[:n], right[:m]) {
			return false
		}
		if errX != nil || errY != nil {
			return ended(errX) && ended(errY)
		}
	}
}

func ended(err error) bool { return errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) }

// place has a file with this content take the name's place at once, and durably.
func place(name string, content io.Reader, mode fs.FileMode) (err error) {
	f, err := os.CreateTemp(filepath.Dir(name), "."+filepath.Base(name)+".*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(f.Name()))
		}
	}()
	_, err = io.Copy(f, content)
	if err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close()); err != nil {
		return err
	}
	return os.Rename(f.Name(), name)
}
