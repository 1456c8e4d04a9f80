package kubelet

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/containernetworking/cni/libcni"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	"k8s.io/klog/v2"
	"k8s.io/kubelet/pkg/cri/streaming"

	"causeway/testbed/kubernetes/kubelet/shim"
)

const (
	// stopDelay is how long a container that is to stop is left alone before SIGTERM, its grace period permitting. Other runtimes take their time too; without any, a server
	// stops listening before anybody can have heard that it will, and people would have to write preStop hooks that sleep even here.
	stopDelay = time.Second

	checkInterval = time.Minute // of CNI CHECK
)

// RuntimeConfig says where a [Runtime] has what.
type RuntimeConfig struct {
	Root        string   // directory of its state
	Cgroup      string   // directory in a cgroup v2
	CNIConf     string   // directory
	CNIBin      []string // directories
	NetNSPrefix string
	Images      string // file, see [Images]
}

// Runtime is a container runtime: CRI v1's RuntimeService. All that it knows is in files, so that another one goes on where it was killed.
type Runtime struct {
	runtimeapi.UnimplementedRuntimeServiceServer
	conf      RuntimeConfig
	network   network
	images    Images
	streaming streaming.Server

	mu         sync.Mutex // guards the maps and what may change in their values
	sandboxes  map[string]*sandbox
	containers map[string]*container
}

// sandbox is a pod's network. Its fields are in a file.
type sandbox struct {
	ID        string
	CreatedAt time.Time
	NetNS     string   // path, "" for the node's
	Addresses []string // as CNI gave them
	Stopped   bool
	config    *runtimeapi.PodSandboxConfig
}

func (s *sandbox) name() string {
	return s.config.GetMetadata().GetNamespace() + "/" + s.config.GetMetadata().GetName()
}

// container is one run of a container; a restart makes another. Its fields are in a file; what became of it is in those of its shim.
type container struct {
	ID, Sandbox string
	CreatedAt   time.Time
	Argv, Env   []string
	config      *runtimeapi.ContainerConfig
	dir         string
	exit        *shim.Exit // once known
}

// NewRuntime takes over what an earlier runtime left in the same directory.
func NewRuntime(ctx context.Context, c RuntimeConfig) (*Runtime, error) {
	r := &Runtime{
		conf: c, images: Images(c.Images), sandboxes: map[string]*sandbox{}, containers: map[string]*container{},
		network: network{cni: libcni.NewCNIConfigWithCacheDir(c.CNIBin, filepath.Join(c.Root, "cni"), nil), confDir: c.CNIConf},
	}
	for _, dir := range []string{r.sandboxDir(""), r.containerDir("")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	if err := r.restore(); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *Runtime) sandboxDir(id string) string   { return filepath.Join(r.conf.Root, "sandboxes", id) }
func (r *Runtime) containerDir(id string) string { return filepath.Join(r.conf.Root, "containers", id) }
func (r *Runtime) podCgroup(s *sandbox) string {
	return filepath.Join(r.conf.Cgroup, "pod"+s.config.GetMetadata().GetUid())
}

const stateFile = "state.json"

// saved is how sandboxes and containers are written.
type saved[T any] struct {
	State  T
	Config json.RawMessage // in protobuf's JSON
}

func save[T any](dir string, state T, config proto.Message) error {
	b, err := protojson.Marshal(config)
	if err != nil {
		return err
	}
	if b, err = json.Marshal(saved[T]{State: state, Config: b}); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	path := filepath.Join(dir, stateFile)
	if err := os.WriteFile(path+".new", b, 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

func load[T any](dir string, state *T, config proto.Message) error {
	path := filepath.Join(dir, stateFile)
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	var s saved[T]
	if err = json.Unmarshal(b, &s); err == nil {
		err = protojson.Unmarshal(s.Config, config)
	}
	if err != nil {
		return fmt.Errorf("reading %s: %w", path, err)
	}
	*state = s.State
	return nil
}

func (r *Runtime) restore() error {
	ids, err := os.ReadDir(r.sandboxDir(""))
	if err != nil {
		return err
	}
	for _, id := range ids {
		s := &sandbox{config: &runtimeapi.PodSandboxConfig{}}
		err := load(r.sandboxDir(id.Name()), s, s.config)
		if errors.Is(err, fs.ErrNotExist) { // killed while it was made or removed
			os.RemoveAll(r.sandboxDir(id.Name()))
			continue
		}
		if err != nil {
			return err
		}
		if _, err := os.Stat(s.NetNS); s.NetNS != "" && err != nil {
			s.Stopped = true // the machine was started anew
		}
		r.sandboxes[s.ID] = s
	}
	ids, err = os.ReadDir(r.containerDir(""))
	if err != nil {
		return err
	}
	for _, id := range ids {
		c := &container{config: &runtimeapi.ContainerConfig{}}
		dir := r.containerDir(id.Name())
		err := load(dir, c, c.config)
		if errors.Is(err, fs.ErrNotExist) {
			os.RemoveAll(dir)
			continue
		}
		if err != nil {
			return err
		}
		c.dir = dir
		r.containers[c.ID] = c
	}
	return nil
}

// Serve serves CRI in the background and returns its endpoint for a kubelet.
func (r *Runtime) Serve(ctx context.Context) (string, error) {
	conf := streaming.DefaultConfig
	conf.Addr = "127.0.0.1:0"
	var err error
	if r.streaming, err = streaming.NewServer(conf, streams{r}); err != nil {
		return "", err
	}
	go func() {
		if err := r.streaming.Start(true); err != nil {
			klog.ErrorS(err, "Serving exec, attach and port-forward")
		}
	}()
	path := filepath.Join(r.conf.Root, "cri.sock")
	os.Remove(path)
	ln, err := net.Listen("unix", path)
	if err != nil {
		return "", fmt.Errorf("listening on %s (at most 107 characters): %w", path, err)
	}
	server := grpc.NewServer()
	runtimeapi.RegisterRuntimeServiceServer(server, r)
	runtimeapi.RegisterImageServiceServer(server, imageService{table: r.images, root: r.conf.Root})
	go server.Serve(ln)
	go r.watchNetwork(ctx)
	return "unix://" + path, nil
}

// watchNetwork has the network's plugins forget what is gone, once, and asks them now and then whether what is there is still right.
func (r *Runtime) watchNetwork(ctx context.Context) {
	err := r.network.gc(ctx, r.networked())
	for {
		if err != nil {
			klog.ErrorS(err, "The network has something to say")
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(checkInterval):
		}
		err = nil
		for _, s := range r.networked() {
			err = errors.Join(err, r.network.check(ctx, s))
		}
	}
}

// networked returns the sandboxes that are connected.
func (r *Runtime) networked() []*sandbox {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*sandbox
	for _, s := range r.sandboxes {
		if s.NetNS != "" && !s.Stopped {
			all = append(all, s)
		}
	}
	return all
}

func newID() string {
	b := make([]byte, 32)
	rand.Read(b)
	return hex.EncodeToString(b)
}

func (r *Runtime) sandbox(id string) (*sandbox, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	s, ok := r.sandboxes[id]
	if !ok {
		return nil, notFound("sandbox", id)
	}
	return s, nil
}

// Version implements CRI.
func (r *Runtime) Version(context.Context, *runtimeapi.VersionRequest) (*runtimeapi.VersionResponse, error) {
	return &runtimeapi.VersionResponse{Version: "0.1.0", RuntimeName: "causeway-testbed", RuntimeVersion: "1", RuntimeApiVersion: "v1"}, nil
}

// Status implements CRI: the network is ready when there is a CNI configuration.
func (r *Runtime) Status(context.Context, *runtimeapi.StatusRequest) (*runtimeapi.StatusResponse, error) {
	ready := &runtimeapi.RuntimeCondition{Type: runtimeapi.NetworkReady, Status: true}
	if _, err := r.network.config(); err != nil {
		ready.Status, ready.Reason, ready.Message = false, "NetworkPluginNotReady", err.Error()
	}
	return &runtimeapi.StatusResponse{Status: &runtimeapi.RuntimeStatus{Conditions: []*runtimeapi.RuntimeCondition{{Type: runtimeapi.RuntimeReady, Status: true}, ready}}}, nil
}

// RuntimeConfig implements CRI.
func (r *Runtime) RuntimeConfig(context.Context, *runtimeapi.RuntimeConfigRequest) (*runtimeapi.RuntimeConfigResponse, error) {
	return &runtimeapi.RuntimeConfigResponse{Linux: &runtimeapi.LinuxRuntimeConfiguration{CgroupDriver: runtimeapi.CgroupDriver_CGROUPFS}}, nil
}

// UpdateRuntimeConfig implements CRI. The pods' prefix is the network's business.
func (r *Runtime) UpdateRuntimeConfig(context.Context, *runtimeapi.UpdateRuntimeConfigRequest) (*runtimeapi.UpdateRuntimeConfigResponse, error) {
	return &runtimeapi.UpdateRuntimeConfigResponse{}, nil
}

// RunPodSandbox implements CRI.
func (r *Runtime) RunPodSandbox(ctx context.Context, req *runtimeapi.RunPodSandboxRequest) (_ *runtimeapi.RunPodSandboxResponse, err error) {
	s := &sandbox{ID: newID(), CreatedAt: time.Now(), config: req.Config, Stopped: true}
	if hostNetwork(s.config) {
		s.Stopped = false
	} else {
		s.NetNS = filepath.Join(netnsDir, r.conf.NetNSPrefix+"-pod-"+s.ID[:12])
	}
	// Written first as stopped, so that the next runtime cleans up if this one is killed meanwhile.
	if err := save(r.sandboxDir(s.ID), *s, s.config); err != nil {
		return nil, err
	}
	if s.NetNS != "" {
		err := addNetNS(s.NetNS)
		if err == nil {
			s.Addresses, err = r.network.add(ctx, s)
			s.Stopped = false
		}
		if err == nil {
			err = save(r.sandboxDir(s.ID), *s, s.config)
		}
		if err != nil {
			return nil, errors.Join(err, r.disconnect(context.WithoutCancel(ctx), s), os.RemoveAll(r.sandboxDir(s.ID)))
		}
	}
	r.mu.Lock()
	r.sandboxes[s.ID] = s
	r.mu.Unlock()
	return &runtimeapi.RunPodSandboxResponse{PodSandboxId: s.ID}, nil
}

func hostNetwork(c *runtimeapi.PodSandboxConfig) bool {
	return c.GetLinux().GetSecurityContext().GetNamespaceOptions().GetNetwork() == runtimeapi.NamespaceMode_NODE
}

// disconnect takes a sandbox's network away; it may be repeated.
func (r *Runtime) disconnect(ctx context.Context, s *sandbox) error {
	if s.NetNS == "" {
		return nil
	}
	if err := r.network.del(ctx, s); err != nil {
		return err // the kubelet tries again; the namespace is kept, for plugins look into it
	}
	return delNetNS(s.NetNS)
}

// StopPodSandbox implements CRI. It may be repeated.
func (r *Runtime) StopPodSandbox(ctx context.Context, req *runtimeapi.StopPodSandboxRequest) (*runtimeapi.StopPodSandboxResponse, error) {
	s, err := r.sandbox(req.PodSandboxId)
	if err != nil {
		return &runtimeapi.StopPodSandboxResponse{}, nil
	}
	for _, c := range r.containersOf(s.ID) {
		if err := r.stop(ctx, c, 0); err != nil {
			return nil, err
		}
	}
	if err := r.disconnect(ctx, s); err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	s.Stopped = true
	return &runtimeapi.StopPodSandboxResponse{}, save(r.sandboxDir(s.ID), *s, s.config)
}

// RemovePodSandbox implements CRI. It may be repeated.
func (r *Runtime) RemovePodSandbox(ctx context.Context, req *runtimeapi.RemovePodSandboxRequest) (*runtimeapi.RemovePodSandboxResponse, error) {
	s, err := r.sandbox(req.PodSandboxId)
	if err != nil {
		return &runtimeapi.RemovePodSandboxResponse{}, nil
	}
	if _, err := r.StopPodSandbox(ctx, &runtimeapi.StopPodSandboxRequest{PodSandboxId: s.ID}); err != nil {
		return nil, err
	}
	for _, c := range r.containersOf(s.ID) {
		if _, err := r.RemoveContainer(ctx, &runtimeapi.RemoveContainerRequest{ContainerId: c.ID}); err != nil {
			return nil, err
		}
	}
	// Cgroups that are in use stay: another sandbox of the same pod may run.
	dirs, _ := filepath.Glob(filepath.Join(r.podCgroup(s), "*", ""))
	for _, dir := range append(dirs, r.podCgroup(s)) {
		unix.Rmdir(dir)
	}
	if err := os.RemoveAll(r.sandboxDir(s.ID)); err != nil {
		return nil, err
	}
	r.mu.Lock()
	delete(r.sandboxes, s.ID)
	r.mu.Unlock()
	return &runtimeapi.RemovePodSandboxResponse{}, nil
}

func (s *sandbox) state() runtimeapi.PodSandboxState {
	if s.Stopped {
		return runtimeapi.PodSandboxState_SANDBOX_NOTREADY
	}
	return runtimeapi.PodSandboxState_SANDBOX_READY
}

// PodSandboxStatus implements CRI.
func (r *Runtime) PodSandboxStatus(_ context.Context, req *runtimeapi.PodSandboxStatusRequest) (*runtimeapi.PodSandboxStatusResponse, error) {
	s, err := r.sandbox(req.PodSandboxId)
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	status := &runtimeapi.PodSandboxStatus{
		Id: s.ID, Metadata: s.config.Metadata, State: s.state(), CreatedAt: s.CreatedAt.UnixNano(), Labels: s.config.Labels, Annotations: s.config.Annotations,
		Network: &runtimeapi.PodSandboxNetworkStatus{},
		Linux:   &runtimeapi.LinuxPodSandboxStatus{Namespaces: &runtimeapi.Namespace{Options: s.config.GetLinux().GetSecurityContext().GetNamespaceOptions()}},
	}
	for i, a := range s.Addresses {
		if i == 0 {
			status.Network.Ip = a
			continue
		}
		status.Network.AdditionalIps = append(status.Network.AdditionalIps, &runtimeapi.PodIP{Ip: a})
	}
	return &runtimeapi.PodSandboxStatusResponse{Status: status}, nil
}

// ListPodSandbox implements CRI.
func (r *Runtime) ListPodSandbox(_ context.Context, req *runtimeapi.ListPodSandboxRequest) (*runtimeapi.ListPodSandboxResponse, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	res := &runtimeapi.ListPodSandboxResponse{}
	f := req.GetFilter()
	for _, s := range r.sandboxes {
		if f.GetId() != "" && f.Id != s.ID || f.GetState() != nil && f.State.State != s.state() || !matches(s.config.Labels, f.GetLabelSelector()) {
			continue
		}
		res.Items = append(res.Items, &runtimeapi.PodSandbox{
			Id: s.ID, Metadata: s.config.Metadata, State: s.state(), CreatedAt: s.CreatedAt.UnixNano(), Labels: s.config.Labels, Annotations: s.config.Annotations,
		})
	}
	return res, nil
}

func matches(labels, selector map[string]string) bool {
	for k, v := range selector {
		if labels[k] != v {
			return false
		}
	}
	return true
}

// resolvConf writes a resolv.conf(5).
func resolvConf(c *runtimeapi.DNSConfig) string {
	var b strings.Builder
	for _, s := range c.GetServers() {
		fmt.Fprintf(&b, "nameserver %s\n", s)
	}
	if len(c.GetSearches()) > 0 {
		fmt.Fprintf(&b, "search %s\n", strings.Join(c.Searches, " "))
	}
	if len(c.GetOptions()) > 0 {
		fmt.Fprintf(&b, "options %s\n", strings.Join(c.Options, " "))
	}
	return b.String()
}
