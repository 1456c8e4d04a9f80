package kubelet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"

	"causeway/testbed/kubernetes/kubelet/shim"
)

// defaultPath is PATH of containers that say none, that of other runtimes.
const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

func notFound(kind, id string) error {
	return status.Errorf(codes.NotFound, "there is no %s %s", kind, id)
}

func (r *Runtime) container(id string) (*container, error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	c, ok := r.containers[id]
	if !ok {
		return nil, notFound("container", id)
	}
	return c, nil
}

func (r *Runtime) containersOf(sandbox string) []*container {
	r.mu.Lock()
	defer r.mu.Unlock()
	var all []*container
	for _, c := range r.containers {
		if c.Sandbox == sandbox {
			all = append(all, c)
		}
	}
	return all
}

// CreateContainer implements CRI.
func (r *Runtime) CreateContainer(_ context.Context, req *runtimeapi.CreateContainerRequest) (*runtimeapi.CreateContainerResponse, error) {
	s, err := r.sandbox(req.PodSandboxId)
	if err != nil {
		return nil, err
	}
	config := req.Config
	image, err := r.images.find(config.GetImage().GetImage())
	if err != nil {
		return nil, err
	}
	id := newID()
	c := &container{ID: id, Sandbox: s.ID, CreatedAt: time.Now(), config: config, dir: r.containerDir(id), Argv: image.argv(config.Command, config.Args), Env: environment(image, s, config)}
	if err := save(c.dir, *c, config); err != nil {
		return nil, err
	}
	r.mu.Lock()
	r.containers[id] = c
	r.mu.Unlock()
	return &runtimeapi.CreateContainerResponse{ContainerId: id}, nil
}

// environment returns a container's: what the runtime adds, then the image's, then its own, the last of a name counts.
func environment(image Image, s *sandbox, c *runtimeapi.ContainerConfig) []string {
	env := map[string]string{}
	order := []string{}
	set := func(k, v string) {
		if _, ok := env[k]; !ok {
			order = append(order, k)
		}
		env[k] = v
	}
	k, v, _ := strings.Cut(defaultPath, "=")
	set(k, v)
	set("HOSTNAME", s.config.GetHostname())
	set("HOME", "/root")
	if c.Tty {
		set("TERM", "xterm")
	}
	names := []string{}
	for k := range image.Env {
		names = append(names, k)
	}
	slices.Sort(names)
	for _, k := range names {
		set(k, image.Env[k])
	}
	for _, e := range c.Envs {
		set(e.Key, string(e.Value))
	}
	all := make([]string, 0, len(order))
	for _, k := range order {
		all = append(all, k+"="+env[k])
	}
	return all
}

// spec returns what the shim is to run.
func (r *Runtime) spec(c *container, s *sandbox) shim.Spec {
	hostname := s.config.GetHostname()
	if hostname == "" { // host network
		hostname, _ = os.Hostname()
	}
	spec := shim.Spec{
		Args: c.Argv, Env: c.Env, Dir: c.config.WorkingDir, Hostname: hostname, NetNS: s.NetNS,
		Cgroup:   filepath.Join(r.podCgroup(s), c.config.GetMetadata().GetName()),
		Terminal: c.config.Tty, Stdin: c.config.Stdin, Once: c.config.StdinOnce, Log: r.logPath(c, s),
		Files: map[string]string{"/etc/hostname": hostname + "\n"},
	}
	if dns := s.config.GetDnsConfig(); dns != nil {
		spec.Files["/etc/resolv.conf"] = resolvConf(dns)
	}
	for _, m := range c.config.Mounts {
		spec.Mounts = append(spec.Mounts, shim.Mount{Source: m.HostPath, Target: m.ContainerPath, ReadOnly: m.Readonly})
	}
	// What lies deeper comes later.
	slices.SortStableFunc(spec.Mounts, func(a, b shim.Mount) int { return strings.Count(a.Target, "/") - strings.Count(b.Target, "/") })
	return spec
}

func (r *Runtime) logPath(c *container, s *sandbox) string {
	return filepath.Join(s.config.GetLogDirectory(), c.config.GetLogPath())
}

// StartContainer implements CRI.
func (r *Runtime) StartContainer(_ context.Context, req *runtimeapi.StartContainerRequest) (*runtimeapi.StartContainerResponse, error) {
	c, err := r.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	s, err := r.sandbox(c.Sandbox)
	if err != nil {
		return nil, err
	}
	for _, m := range c.config.Mounts {
		// As other runtimes do for a hostPath without a type.
		if _, err := os.Stat(m.HostPath); errors.Is(err, fs.ErrNotExist) {
			if err := os.MkdirAll(m.HostPath, 0o755); err != nil {
				return nil, err
			}
		}
	}
	// Not in the container's cgroup, so that the shim is not what connects to services.
	if err := shim.Run(c.dir, filepath.Join(r.podCgroup(s), ".shims"), r.spec(c, s)); err != nil {
		return nil, fmt.Errorf("starting the container %s of %s: %w", c.config.GetMetadata().GetName(), s.name(), err)
	}
	return &runtimeapi.StartContainerResponse{}, nil
}

// look returns when a container started, and how it ended; nil for what has not happened.
func (r *Runtime) look(c *container) (*shim.Start, *shim.Exit) {
	start, err := shim.ReadStart(c.dir)
	started := &start
	if err != nil {
		started = nil
	}
	r.mu.Lock()
	exit := c.exit
	r.mu.Unlock()
	if exit != nil {
		return started, exit
	}
	alive := started != nil && start.Alive() // before looking for the file, which a shim writes before it ends
	e, err := shim.ReadExit(c.dir)
	switch {
	case err == nil:
	case started != nil && !alive:
		e = shim.Exit{At: time.Now(), Code: 137, Reason: shim.Unknown, Message: "the process that held the container was killed"}
	default:
		return started, nil
	}
	r.mu.Lock()
	c.exit = &e
	r.mu.Unlock()
	return started, &e
}

func stateOf(start *shim.Start, exit *shim.Exit) runtimeapi.ContainerState {
	switch {
	case exit != nil:
		return runtimeapi.ContainerState_CONTAINER_EXITED
	case start != nil:
		return runtimeapi.ContainerState_CONTAINER_RUNNING
	}
	return runtimeapi.ContainerState_CONTAINER_CREATED
}

// running returns the first process of a container.
func (r *Runtime) running(id string) (*container, shim.Start, error) {
	c, err := r.container(id)
	if err != nil {
		return nil, shim.Start{}, err
	}
	start, exit := r.look(c)
	if start == nil || exit != nil {
		return nil, shim.Start{}, status.Errorf(codes.FailedPrecondition, "the container %s does not run", c.config.GetMetadata().GetName())
	}
	return c, *start, nil
}

// StopContainer implements CRI.
func (r *Runtime) StopContainer(ctx context.Context, req *runtimeapi.StopContainerRequest) (*runtimeapi.StopContainerResponse, error) {
	c, err := r.container(req.ContainerId)
	if err != nil {
		return &runtimeapi.StopContainerResponse{}, nil
	}
	return &runtimeapi.StopContainerResponse{}, r.stop(ctx, c, time.Duration(req.Timeout)*time.Second)
}

// stop ends a container's first process, and all others with it: by SIGTERM after stopDelay, by SIGKILL after grace.
func (r *Runtime) stop(ctx context.Context, c *container, grace time.Duration) error {
	start, exit := r.look(c)
	if start == nil || exit != nil {
		return nil
	}
	// The shim tells how the container ended, then it ends.
	pidfd, err := unix.PidfdOpen(start.Shim, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(pidfd)
	deadline := time.Now().Add(grace)
	if ended, err := waitEnd(ctx, pidfd, min(stopDelay, grace)); ended || err != nil {
		return err
	}
	if grace > 0 {
		unix.Kill(start.PID, unix.SIGTERM)
	}
	if ended, err := waitEnd(ctx, pidfd, time.Until(deadline)); ended || err != nil {
		return err
	}
	unix.Kill(start.PID, unix.SIGKILL)
	ended, err := waitEnd(ctx, pidfd, time.Minute)
	if err == nil && !ended {
		err = fmt.Errorf("the container %s does not end, not even by SIGKILL", c.config.GetMetadata().GetName())
	}
	return err
}

// waitEnd waits until a process has ended, at most so long.
func waitEnd(ctx context.Context, pidfd int, limit time.Duration) (bool, error) {
	deadline := time.Now().Add(limit)
	for {
		// Short, because ctx may end meanwhile.
		left := max(0, min(time.Until(deadline), 100*time.Millisecond))
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		switch {
		case err != nil && !errors.Is(err, unix.EINTR):
			return false, err
		case n > 0:
			return true, nil
		case ctx.Err() != nil:
			return false, ctx.Err()
		case !time.Now().Before(deadline):
			return false, nil
		}
	}
}

// RemoveContainer implements CRI. It may be repeated.
func (r *Runtime) RemoveContainer(ctx context.Context, req *runtimeapi.RemoveContainerRequest) (*runtimeapi.RemoveContainerResponse, error) {
	c, err := r.container(req.ContainerId)
	if err != nil {
		return &runtimeapi.RemoveContainerResponse{}, nil
	}
	if err := r.stop(ctx, c, 0); err != nil {
		return nil, err
	}
	if err := os.RemoveAll(c.dir); err != nil {
		return nil, err
	}
	r.mu.Lock()
	delete(r.containers, c.ID)
	r.mu.Unlock()
	return &runtimeapi.RemoveContainerResponse{}, nil
}

// ListContainers implements CRI.
func (r *Runtime) ListContainers(_ context.Context, req *runtimeapi.ListContainersRequest) (*runtimeapi.ListContainersResponse, error) {
	r.mu.Lock()
	all := make([]*container, 0, len(r.containers))
	for _, c := range r.containers {
		all = append(all, c)
	}
	r.mu.Unlock()
	res := &runtimeapi.ListContainersResponse{}
	f := req.GetFilter()
	for _, c := range all {
		state := stateOf(r.look(c))
		if f.GetId() != "" && f.Id != c.ID || f.GetPodSandboxId() != "" && f.PodSandboxId != c.Sandbox || f.GetState() != nil && f.State.State != state ||
			!matches(c.config.Labels, f.GetLabelSelector()) {
			continue
		}
		res.Containers = append(res.Containers, &runtimeapi.Container{
			Id: c.ID, PodSandboxId: c.Sandbox, Metadata: c.config.Metadata, Image: c.config.Image, ImageRef: c.config.GetImage().GetImage(), ImageId: c.config.GetImage().GetImage(), State: state,
			CreatedAt: c.CreatedAt.UnixNano(), Labels: c.config.Labels, Annotations: c.config.Annotations,
		})
	}
	return res, nil
}

// ContainerStatus implements CRI.
func (r *Runtime) ContainerStatus(_ context.Context, req *runtimeapi.ContainerStatusRequest) (*runtimeapi.ContainerStatusResponse, error) {
	c, err := r.container(req.ContainerId)
	if err != nil {
		return nil, err
	}
	s, err := r.sandbox(c.Sandbox)
	if err != nil {
		return nil, err
	}
	start, exit := r.look(c)
	st := &runtimeapi.ContainerStatus{
		Id: c.ID, Metadata: c.config.Metadata, State: stateOf(start, exit), CreatedAt: c.CreatedAt.UnixNano(), Image: c.config.Image, ImageRef: c.config.GetImage().GetImage(),
		ImageId: c.config.GetImage().GetImage(), Labels: c.config.Labels, Annotations: c.config.Annotations, Mounts: c.config.Mounts, LogPath: r.logPath(c, s),
	}
	if start != nil {
		st.StartedAt = start.At.UnixNano()
	}
	if exit != nil {
		st.FinishedAt, st.ExitCode, st.Reason, st.Message = exit.At.UnixNano(), int32(exit.Code), exit.Reason, exit.Message
	}
	return &runtimeapi.ContainerStatusResponse{Status: st}, nil
}

// ReopenContainerLog implements CRI.
func (r *Runtime) ReopenContainerLog(_ context.Context, req *runtimeapi.ReopenContainerLogRequest) (*runtimeapi.ReopenContainerLogResponse, error) {
	_, start, err := r.running(req.ContainerId)
	if err != nil {
		return nil, err
	}
	return &runtimeapi.ReopenContainerLogResponse{}, start.ReopenLog()
}

// UpdateContainerResources implements CRI: there are no limits.
func (r *Runtime) UpdateContainerResources(context.Context, *runtimeapi.UpdateContainerResourcesRequest) (*runtimeapi.UpdateContainerResourcesResponse, error) {
	return &runtimeapi.UpdateContainerResourcesResponse{}, nil
}

// ListContainerStats implements CRI: nothing is measured.
func (r *Runtime) ListContainerStats(context.Context, *runtimeapi.ListContainerStatsRequest) (*runtimeapi.ListContainerStatsResponse, error) {
	return &runtimeapi.ListContainerStatsResponse{}, nil
}

// ListPodSandboxStats implements CRI: nothing is measured.
func (r *Runtime) ListPodSandboxStats(context.Context, *runtimeapi.ListPodSandboxStatsRequest) (*runtimeapi.ListPodSandboxStatsResponse, error) {
	return &runtimeapi.ListPodSandboxStatsResponse{}, nil
}
