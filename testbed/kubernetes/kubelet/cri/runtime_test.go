package cri

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/client-go/tools/remotecommand"
	runtimeapi "k8s.io/cri-api/pkg/apis/runtime/v1"
	utilexec "k8s.io/utils/exec"

	"causeway/testbed/kubernetes/kubelet/cri/shim"
)

// machineOf gives a test a runtime's directories and a CNI plugin that writes down what it is asked.
type machineOf struct {
	*testing.T
	conf   Config
	record string
}

const conflist = `{"cniVersion": "1.1.0", "name": "test", "plugins": [{"type": "recorder", "capabilities": {"portMappings": true}}]}`

func newMachine(t *testing.T) *machineOf {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("namespaces need root")
	}
	dir := t.TempDir()
	m := &machineOf{T: t, record: filepath.Join(dir, "record")}
	t.Setenv("RECORD", m.record)
	plugins, err := filepath.Abs("testdata/bin")
	if err != nil {
		t.Fatal(err)
	}
	cgroup, err := os.MkdirTemp(cgroupMount(t), "kubelet-test-")
	if err != nil {
		t.Fatal(err)
	}
	m.conf = Config{
		Root: filepath.Join(dir, "root"), Cgroup: cgroup, CNIConf: filepath.Join(dir, "conf"), CNIBin: []string{plugins},
		NetNSPrefix: filepath.Base(cgroup), Images: filepath.Join(dir, "images.yaml"),
	}
	for _, d := range []string{m.conf.CNIConf, m.conf.Root} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	m.write(filepath.Join(m.conf.CNIConf, "10-test.conflist"), conflist)
	m.write(m.conf.Images, `[{image: sh, command: [sh, -c]}, {image: none}]`)
	t.Cleanup(func() {
		// Whatever a failed test left.
		os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
		left, _ := filepath.Glob(filepath.Join(netnsDir, m.conf.NetNSPrefix+"*"))
		for _, path := range left {
			delNetNS(path)
		}
		for end := time.Now().Add(5 * time.Second); ; {
			if removeDirs(cgroup) == nil || time.Now().After(end) {
				break
			}
		}
		if t.Failed() {
			return
		}
		if _, err := os.Stat(cgroup); err == nil {
			t.Errorf("the cgroup %s is left", cgroup)
		}
	})
	return m
}

// removeDirs removes empty directories, the innermost first.
func removeDirs(dir string) error {
	inner, _ := filepath.Glob(filepath.Join(dir, "*") + string(filepath.Separator))
	hidden, _ := filepath.Glob(filepath.Join(dir, ".*") + string(filepath.Separator))
	for _, d := range append(inner, hidden...) {
		removeDirs(d)
	}
	return os.Remove(dir)
}

func cgroupMount(t *testing.T) string {
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); f[2] == "cgroup2" {
			return f[1]
		}
	}
	t.Skip("cgroup v2 is not mounted")
	return ""
}

func (m *machineOf) write(path, content string) {
	m.Helper()
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		m.Fatal(err)
	}
}

// start returns a runtime on the machine, as after a restart if there was one before.
func (m *machineOf) start() *Runtime {
	m.Helper()
	r, err := New(m.conf)
	if err != nil {
		m.Fatal(err)
	}
	return r
}

// calls of the plugin so far.
func (m *machineOf) calls() []string {
	b, _ := os.ReadFile(m.record)
	return strings.Split(strings.TrimSpace(string(b)), "\n")
}

// test is a runtime with a sandbox.
type test struct {
	*machineOf
	*Runtime
	pod   *runtimeapi.PodSandboxConfig
	podID string
}

func newTest(t *testing.T) *test {
	m := newMachine(t)
	return (&test{machineOf: m, Runtime: m.start()}).withPod()
}

func (t *test) withPod() *test {
	t.Helper()
	t.pod = &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "uid-1"}, Hostname: "web", LogDirectory: t.conf().Root,
		DnsConfig:    &runtimeapi.DNSConfig{Servers: []string{"10.96.0.10"}},
		PortMappings: []*runtimeapi.PortMapping{{ContainerPort: 80, HostPort: 8080}, {ContainerPort: 81}},
		Labels:       map[string]string{"app": "web"},
	}
	res, err := t.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: t.pod})
	if err != nil {
		t.Fatal(err)
	}
	t.podID = res.PodSandboxId
	return t
}

func (t *test) conf() Config { return t.machineOf.conf }

// run starts a container that runs a shell script and returns its identifier.
func (t *test) run(name, script string, change ...func(*runtimeapi.ContainerConfig)) string {
	t.Helper()
	id, err := t.tryRun(name, script, change...)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func (t *test) tryRun(name, script string, change ...func(*runtimeapi.ContainerConfig)) (string, error) {
	t.Helper()
	c := &runtimeapi.ContainerConfig{
		Metadata: &runtimeapi.ContainerMetadata{Name: name}, Image: &runtimeapi.ImageSpec{Image: "sh"}, Args: []string{script}, LogPath: name + ".log", Labels: map[string]string{"c": name},
	}
	for _, f := range change {
		f(c)
	}
	res, err := t.CreateContainer(t.Context(), &runtimeapi.CreateContainerRequest{PodSandboxId: t.podID, Config: c})
	if err != nil {
		t.Fatal(err)
	}
	_, err = t.StartContainer(t.Context(), &runtimeapi.StartContainerRequest{ContainerId: res.ContainerId})
	return res.ContainerId, err
}

func (t *test) status(id string) *runtimeapi.ContainerStatus {
	t.Helper()
	res, err := t.ContainerStatus(t.Context(), &runtimeapi.ContainerStatusRequest{ContainerId: id})
	if err != nil {
		t.Fatal(err)
	}
	return res.Status
}

// ended waits until a container has ended.
func (t *test) ended(id string) *runtimeapi.ContainerStatus {
	t.Helper()
	return eventually(t.T, func() (*runtimeapi.ContainerStatus, error) {
		s := t.status(id)
		if s.State != runtimeapi.ContainerState_CONTAINER_EXITED {
			return nil, fmt.Errorf("the container is %v", s.State)
		}
		return s, nil
	})
}

// logged waits until a container's log has the text, its lines without their time.
func (t *test) logged(name, want string) string {
	t.Helper()
	return eventually(t.T, func() (string, error) {
		b, err := os.ReadFile(filepath.Join(t.conf().Root, name+".log"))
		if err != nil {
			return "", err
		}
		var lines strings.Builder
		for line := range strings.Lines(string(b)) {
			_, line, _ = strings.Cut(line, " ")
			lines.WriteString(line)
		}
		if got := lines.String(); !strings.Contains(got, want) {
			return "", fmt.Errorf("the log is %q, without %q", got, want)
		}
		return lines.String(), nil
	})
}

func eventually[V any](t *testing.T, try func() (V, error)) V {
	t.Helper()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for end := time.After(20 * time.Second); ; {
		v, err := try()
		if err == nil {
			return v
		}
		select {
		case <-tick.C:
		case <-end:
			t.Fatal(err)
		}
	}
}

func (t *test) removePod() {
	t.Helper()
	if _, err := t.RemovePodSandbox(t.Context(), &runtimeapi.RemovePodSandboxRequest{PodSandboxId: t.podID}); err != nil {
		t.Fatal(err)
	}
}

func TestContainer(tt *testing.T) {
	t := newTest(tt)
	secret := filepath.Join(t.TempDir(), "secret")
	t.write(secret, "s3cret")
	mark := filepath.Join(os.TempDir(), filepath.Base(t.conf().Cgroup))
	id := t.run("c", `echo out; echo err >&2; hostname; cat /etc/resolv.conf /deep/secret; echo; echo x >/deep/secret || echo read-only; echo pid $$; pwd; echo $GREETING
		cat /proc/self/cgroup; ls /sys/class/net; echo >`+mark+`; printf 'no newline'; exit 3`,
		func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{ContainerPath: "/deep/secret", HostPath: secret, Readonly: true}}
			c.WorkingDir = "/work/dir"
			c.Envs = []*runtimeapi.KeyValue{{Key: "GREETING", Value: []byte("hello")}}
		})
	s := t.ended(id)
	if s.ExitCode != 3 || s.Reason != "Error" || s.StartedAt < s.CreatedAt || s.FinishedAt < s.StartedAt {
		t.Errorf("the container ended as %v", s)
	}
	log := t.logged("c", "no newline")
	for _, want := range []string{
		"stdout F out\n", "stderr F err\n", "F web\n", "F nameserver 10.96.0.10\n", "F s3cret\n", "F read-only\n", "F pid 1\n", "F /work/dir\n", "F hello\n",
		"/" + filepath.Base(t.conf().Cgroup) + "/poduid-1/c\n", "stdout F lo\n", "stdout P no newline\n",
	} {
		if !strings.Contains(log, want) {
			t.Errorf("the log lacks %q:\n%s", want, log)
		}
	}
	if _, err := os.Stat(mark); err == nil {
		t.Errorf("the container wrote %s on the machine", mark)
	}
	if b, err := os.ReadFile(secret); string(b) != "s3cret" {
		t.Errorf("the container wrote %q (%v) to what it must only read", b, err)
	}
	t.removePod()
	if left, _ := os.ReadDir(t.conf().Cgroup); hasDirs(left) {
		t.Errorf("cgroups are left: %v", left)
	}
}

func hasDirs(entries []os.DirEntry) bool {
	for _, e := range entries {
		if e.IsDir() {
			return true
		}
	}
	return false
}

func TestContainerThatCannotStart(tt *testing.T) {
	t := newTest(tt)
	for says, change := range map[string]func(*runtimeapi.ContainerConfig){
		"executable file not found": func(c *runtimeapi.ContainerConfig) { c.Command = []string{"no-such-program"} },
		"no command":                func(c *runtimeapi.ContainerConfig) { c.Image.Image, c.Args = "none", nil },
		"opening /dev/null/x": func(c *runtimeapi.ContainerConfig) {
			c.Mounts = []*runtimeapi.Mount{{HostPath: "/dev/null/x", ContainerPath: "/x"}}
		},
	} {
		id, err := t.tryRun("c", "", change)
		if err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%v, which does not say %q", err, says)
			continue
		}
		if s := t.status(id); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != 128 || s.Reason != "StartError" || !strings.Contains(s.Message, says) {
			t.Errorf("the container is %v", s)
		}
	}
	t.removePod()
}

func TestUnknownImage(tt *testing.T) {
	t := newTest(tt)
	images := imageService{table: t.images, root: t.conf().Root}
	spec := &runtimeapi.ImageSpec{Image: "shop:1"}
	if res, err := images.ImageStatus(t.Context(), &runtimeapi.ImageStatusRequest{Image: spec}); err != nil || res.Image != nil {
		t.Errorf("there is an image %v (%v)", res, err)
	}
	if _, err := images.PullImage(t.Context(), &runtimeapi.PullImageRequest{Image: spec}); err == nil || !strings.Contains(err.Error(), t.conf().Images) {
		t.Errorf("%v, which does not name the table", err)
	}
	t.removePod()
}

func TestStop(tt *testing.T) {
	t := newTest(tt)
	const trapping = `trap 'echo terminated; exit 0' TERM; echo ready; while :; do sleep 0.01; done`
	for _, c := range []struct {
		name, script  string
		grace         int64
		code          int32
		atLeast, most time.Duration
	}{
		{"polite", trapping, 10, 0, stopDelay, 9 * time.Second},
		{"deaf", `trap '' TERM; echo ready; while :; do sleep 0.01; done`, 2, 137, 2 * time.Second, 10 * time.Second},
		{"at-once", trapping, 0, 137, 0, 10 * time.Second},
	} {
		id := t.run(c.name, c.script)
		t.logged(c.name, "ready")
		began := time.Now()
		if _, err := t.StopContainer(t.Context(), &runtimeapi.StopContainerRequest{ContainerId: id, Timeout: c.grace}); err != nil {
			t.Fatal(err)
		}
		took := time.Since(began)
		if s := t.status(id); s.State != runtimeapi.ContainerState_CONTAINER_EXITED || s.ExitCode != c.code {
			t.Errorf("%s ended as %v", c.name, s)
		}
		if took < c.atLeast || took > c.most {
			t.Errorf("%s took %v to stop, not between %v and %v", c.name, took, c.atLeast, c.most)
		}
	}
	t.removePod()
}

// A kubelet is killed and started anew: containers run on, and what happened meanwhile is known.
func TestRestart(tt *testing.T) {
	t := newTest(tt)
	stays := t.run("stays", `echo ready; while :; do sleep 0.01; done`)
	goes := t.run("goes", `echo ready; read line; exit 5`, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
	t.logged("stays", "ready")
	t.logged("goes", "ready")
	before := t.status(stays)

	t.Runtime = nil // what is in memory is lost
	fifo, err := os.OpenFile(filepath.Join(t.conf().Root, "containers", goes, shim.Stdin), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	fmt.Fprintln(fifo, "go")
	fifo.Close()
	t.Runtime = t.start()

	if s := t.status(stays); s.String() != before.String() {
		t.Errorf("the container was\n%v, and is\n%v", before, s)
	}
	if s := t.ended(goes); s.ExitCode != 5 {
		t.Errorf("the other ended as %v", s)
	}
	res, err := t.PodSandboxStatus(t.Context(), &runtimeapi.PodSandboxStatusRequest{PodSandboxId: t.podID})
	if err != nil || res.Status.Network.Ip != "10.1.2.3" || res.Status.Network.AdditionalIps[0].Ip != "fd00::3" || res.Status.State != runtimeapi.PodSandboxState_SANDBOX_READY {
		t.Errorf("the sandbox is %v (%v)", res, err)
	}
	if code, err := t.exec(t.Context(), stays, []string{"true"}, nil, nil, nil); code != 0 || err != nil {
		t.Errorf("exec: %d, %v", code, err)
	}
	t.removePod()
}

// The shim is killed: the container ends with it, and that is known.
func TestShimKilled(tt *testing.T) {
	t := newTest(tt)
	id := t.run("c", `echo ready; while :; do sleep 0.01; done`)
	t.logged("c", "ready")
	start, err := shim.ReadStart(filepath.Join(t.conf().Root, "containers", id))
	if err != nil {
		t.Fatal(err)
	}
	p, err := os.FindProcess(start.Shim)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	if s := t.ended(id); s.ExitCode != 137 || s.Reason != "ContainerStatusUnknown" {
		t.Errorf("the container ended as %v", s)
	}
	eventually(t.T, func() (any, error) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d", start.PID)); err == nil {
			return nil, errors.New("its process is still there")
		}
		return nil, nil
	})
	t.removePod()
}

func TestExec(tt *testing.T) {
	t := newTest(tt)
	id := t.run("c", `echo ready; while :; do sleep 0.01; done`)
	t.logged("c", "ready")
	res, err := t.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sh", "-c", "hostname; cat /proc/self/cgroup; echo no >&2; exit 7"}})
	if err != nil || res.ExitCode != 7 || !strings.HasPrefix(string(res.Stdout), "web\n") || !strings.Contains(string(res.Stdout), "/poduid-1/c\n") || string(res.Stderr) != "no\n" {
		t.Errorf("got %v, %v", res, err)
	}
	res, err = t.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"no-such-program"}})
	if err != nil || res.ExitCode != 127 || !strings.Contains(string(res.Stderr), "executable file not found") {
		t.Errorf("got %v, %v", res, err)
	}
	_, err = t.ExecSync(t.Context(), &runtimeapi.ExecSyncRequest{ContainerId: id, Cmd: []string{"sleep", "1000"}, Timeout: 1})
	if status.Code(err) != codes.DeadlineExceeded {
		t.Errorf("a command that takes too long: %v", err)
	}
	eventually(t.T, func() (any, error) {
		if code, err := t.exec(t.Context(), id, []string{"pgrep", "-x", "sleep", "-f", "sleep 1000"}, nil, nil, nil); code == 0 {
			return nil, fmt.Errorf("it still runs (%v)", err)
		}
		return nil, nil
	})
	var out bytes.Buffer
	if code, err := t.exec(t.Context(), id, []string{"cat"}, strings.NewReader("through"), &out, nil); code != 0 || err != nil || out.String() != "through" {
		t.Errorf("cat gave %q, %d, %v", out.String(), code, err)
	}
	var exit utilexec.ExitError
	if err := (streams{t.Runtime}).Exec(t.Context(), id, []string{"false"}, nil, nil, nil, false, nil); !errors.As(err, &exit) || exit.ExitStatus() != 1 {
		t.Errorf("false: %v", err)
	}
	t.removePod()
	if _, err := t.Exec(t.Context(), &runtimeapi.ExecRequest{ContainerId: id}); status.Code(err) != codes.NotFound {
		t.Errorf("exec in a container that is gone: %v", err)
	}
}

// screen is what a terminal shows.
type screen struct {
	mu   sync.Mutex
	text strings.Builder
}

func (s *screen) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(b)
}

func (*screen) Close() error { return nil }

func (s *screen) shows(t *testing.T, want string) {
	t.Helper()
	eventually(t, func() (any, error) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if !strings.Contains(s.text.String(), want) {
			return nil, fmt.Errorf("the terminal shows %q, not %q", s.text.String(), want)
		}
		return nil, nil
	})
}

func TestTerminals(tt *testing.T) {
	t := newTest(tt)
	id := t.run("c", `echo ready; stty size; exec sh`, func(c *runtimeapi.ContainerConfig) { c.Tty, c.Stdin = true, true })
	t.logged("c", "ready")
	// In this order: the one that attaches ends the container.
	for _, c := range []struct {
		name  string
		start func(in io.Reader, out io.WriteCloser, sizes <-chan remotecommand.TerminalSize) error
	}{
		{"exec", func(in io.Reader, out io.WriteCloser, sizes <-chan remotecommand.TerminalSize) error {
			return streams{t.Runtime}.Exec(t.Context(), id, []string{"sh"}, in, out, nil, true, sizes)
		}},
		{"attach", func(in io.Reader, out io.WriteCloser, sizes <-chan remotecommand.TerminalSize) error {
			return streams{t.Runtime}.Attach(t.Context(), id, in, out, nil, true, sizes)
		}},
	} {
		in, keys := io.Pipe()
		show := &screen{}
		sizes := make(chan remotecommand.TerminalSize)
		done := make(chan error, 1)
		go func() { done <- c.start(in, show, sizes) }()
		if c.name == "exec" {
			show.shows(tt, "# ") // a prompt, which is no whole line
		}
		sizes <- remotecommand.TerminalSize{Height: 37, Width: 91}
		fmt.Fprintln(keys, "until [ \"$(stty size)\" = '37 91' ]; do :; done; echo seen-$((6 * 7))")
		show.shows(tt, "seen-42")
		if c.name == "attach" {
			fmt.Fprintln(keys, "exit 0")
			if err := <-done; err != nil {
				t.Errorf("attach ended with %v", err)
			}
			continue
		}
		fmt.Fprintln(keys, "exit 4")
		var exit utilexec.ExitError
		if err := <-done; !errors.As(err, &exit) || exit.ExitStatus() != 4 {
			t.Errorf("exec ended with %v", err)
		}
		keys.Close()
	}
	t.removePod()
}

func TestPortForward(tt *testing.T) {
	t := newTest(tt)
	sb, err := t.sandbox(t.podID)
	if err != nil {
		t.Fatal(err)
	}
	var ln net.Listener
	if err := inNetNS(sb.NetNS, func() (err error) { ln, err = net.Listen("tcp", "[::1]:8080"); return err }); err != nil {
		t.Fatal(err)
	}
	go func() {
		conn, err := ln.Accept()
		if err == nil {
			io.Copy(conn, conn)
			conn.Close()
		}
	}()
	client, server := net.Pipe()
	done := make(chan error, 1)
	go func() { done <- streams{t.Runtime}.PortForward(t.Context(), t.podID, 8080, server) }()
	fmt.Fprint(client, "ping")
	buf := make([]byte, 4)
	if _, err := io.ReadFull(client, buf); err != nil || string(buf) != "ping" {
		t.Errorf("got %q, %v", buf, err)
	}
	client.Close()
	<-done
	ln.Close()
	_, server = net.Pipe()
	if err := (streams{t.Runtime}).PortForward(t.Context(), t.podID, 9, server); err == nil || !strings.Contains(err.Error(), "port 9 of shop/web") {
		t.Errorf("to a closed port: %v", err)
	}
	t.removePod()
}

func TestNetwork(tt *testing.T) {
	t := newTest(tt)
	sb, err := t.sandbox(t.podID)
	if err != nil {
		t.Fatal(err)
	}
	if want := filepath.Join(netnsDir, t.conf().NetNSPrefix+"-pod-"+t.podID[:12]); sb.NetNS != want {
		t.Errorf("the network namespace is %s, not %s", sb.NetNS, want)
	}
	add := t.calls()[0]
	for _, want := range []string{
		"ADD " + t.podID + " eth0 " + sb.NetNS, "K8S_POD_NAMESPACE=shop", "K8S_POD_NAME=web", "K8S_POD_INFRA_CONTAINER_ID=" + t.podID, "K8S_POD_UID=uid-1",
		`"portMappings":[{"containerPort":80,"hostIP":"","hostPort":8080,"protocol":"tcp"}]`,
	} {
		if !strings.Contains(add, want) {
			t.Errorf("ADD was %q, without %q", add, want)
		}
	}
	if err := t.network.check(t.Context(), sb); err != nil {
		t.Error(err)
	}
	// The network's configuration is replaced: the pod leaves by the old one, which knows it.
	t.write(filepath.Join(t.conf().CNIConf, "10-test.conflist"), strings.Replace(conflist, `"test"`, `"other"`, 1))
	t.Runtime = t.start()
	if err := t.network.gc(t.Context(), t.networked()); err != nil {
		t.Error(err)
	}
	t.removePod()
	t.removePod() // there is no harm in that
	for i, want := range []string{"ADD", "CHECK", "GC", "DEL"} {
		calls := t.calls()
		if i >= len(calls) || !strings.HasPrefix(calls[i], want+" ") {
			t.Fatalf("the plugin was called as %q, not ADD, CHECK, GC, DEL", calls)
		}
		if network := map[bool]string{true: "other", false: "test"}[want == "GC"]; !strings.Contains(calls[i], `"name":"`+network+`"`) {
			t.Errorf("%s was not for the network %s: %s", want, network, calls[i])
		}
		if want == "GC" && !strings.Contains(calls[i], t.podID) {
			t.Errorf("GC does not spare the pod: %s", calls[i])
		}
	}
	if n := len(t.calls()); n != 4 {
		t.Errorf("there were %d calls: %q", n, t.calls())
	}
	if _, err := os.Stat(sb.NetNS); err == nil {
		t.Error("the network namespace is left")
	}
}

// The plugin fails: the pod is not there, nothing is left, and the plugin was told.
func TestNetworkFails(tt *testing.T) {
	m := newMachine(tt)
	r := m.start()
	m.write(m.record+".fail", "")
	_, err := r.RunPodSandbox(m.Context(), &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "shop"}}})
	if err == nil || !strings.Contains(err.Error(), "CNI ADD of shop/web") || !strings.Contains(err.Error(), "try again later") {
		m.Errorf("got %v", err)
	}
	if calls := m.calls(); len(calls) != 2 || !strings.HasPrefix(calls[1], "DEL ") {
		m.Errorf("the plugin was called as %q", calls)
	}
	if left, _ := filepath.Glob(filepath.Join(netnsDir, m.conf.NetNSPrefix+"*")); len(left) > 0 {
		m.Errorf("%q is left", left)
	}
	if res, _ := r.ListPodSandbox(m.Context(), &runtimeapi.ListPodSandboxRequest{}); len(res.Items) > 0 {
		m.Errorf("there is a sandbox %v", res.Items)
	}
	// Without a configuration the node is not ready, and says why.
	if err := os.Remove(filepath.Join(m.conf.CNIConf, "10-test.conflist")); err != nil {
		m.Fatal(err)
	}
	res, err := r.Status(m.Context(), &runtimeapi.StatusRequest{})
	if err != nil || res.Status.Conditions[1].Status || !strings.Contains(res.Status.Conditions[1].Message, m.conf.CNIConf) {
		m.Errorf("the runtime says %v, %v", res, err)
	}
}

func TestHostNetwork(tt *testing.T) {
	m := newMachine(tt)
	t := &test{machineOf: m, Runtime: m.start()}
	res, err := t.RunPodSandbox(t.Context(), &runtimeapi.RunPodSandboxRequest{Config: &runtimeapi.PodSandboxConfig{
		Metadata: &runtimeapi.PodSandboxMetadata{Name: "web", Namespace: "shop", Uid: "uid-1"}, LogDirectory: m.conf.Root,
		Linux: &runtimeapi.LinuxPodSandboxConfig{SecurityContext: &runtimeapi.LinuxSandboxSecurityContext{NamespaceOptions: &runtimeapi.NamespaceOption{Network: runtimeapi.NamespaceMode_NODE}}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	t.podID = res.PodSandboxId
	own, err := os.Readlink("/proc/thread-self/ns/net")
	if err != nil {
		t.Fatal(err)
	}
	t.ended(t.run("c", "readlink /proc/self/ns/net"))
	t.logged("c", own)
	t.removePod()
	if calls := t.calls(); calls[0] != "" {
		t.Errorf("the plugin was called: %q", calls)
	}
}

func TestLists(tt *testing.T) {
	t := newTest(tt)
	ends, runs := t.run("ends", "exit 0"), t.run("runs", "while :; do sleep 0.01; done")
	t.ended(ends)
	for want, f := range map[string]*runtimeapi.ContainerFilter{
		ends: {State: &runtimeapi.ContainerStateValue{State: runtimeapi.ContainerState_CONTAINER_EXITED}},
		runs: {LabelSelector: map[string]string{"c": "runs"}, PodSandboxId: t.podID},
	} {
		res, err := t.ListContainers(t.Context(), &runtimeapi.ListContainersRequest{Filter: f})
		if err != nil || len(res.Containers) != 1 || res.Containers[0].Id != want {
			t.Errorf("%v gives %v, %v", f, res, err)
		}
	}
	for want, f := range map[int]*runtimeapi.PodSandboxFilter{
		1: {State: &runtimeapi.PodSandboxStateValue{State: runtimeapi.PodSandboxState_SANDBOX_READY}},
		0: {LabelSelector: map[string]string{"app": "other"}},
	} {
		res, err := t.ListPodSandbox(t.Context(), &runtimeapi.ListPodSandboxRequest{Filter: f})
		if err != nil || len(res.Items) != want {
			t.Errorf("%v gives %v, %v", f, res, err)
		}
	}
	t.removePod()
}

func TestReopenLog(tt *testing.T) {
	t := newTest(tt)
	id := t.run("c", `echo before; while read line; do echo $line; done`, func(c *runtimeapi.ContainerConfig) { c.Stdin = true })
	t.logged("c", "before")
	path := filepath.Join(t.conf().Root, "c.log")
	if err := os.Rename(path, path+".old"); err != nil {
		t.Fatal(err)
	}
	if _, err := t.ReopenContainerLog(t.Context(), &runtimeapi.ReopenContainerLogRequest{ContainerId: id}); err != nil {
		t.Fatal(err)
	}
	eventually(t.T, func() (any, error) { _, err := os.Stat(path); return nil, err })
	fifo, err := os.OpenFile(filepath.Join(t.conf().Root, "containers", id, shim.Stdin), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer fifo.Close()
	fmt.Fprintln(fifo, "after")
	if log := t.logged("c", "after"); strings.Contains(log, "before") {
		t.Errorf("the new log is %q", log)
	}
	t.removePod()
}

// A shim works before Kubernetes' packages are initialized: there may be a hundred of them.
func TestShimStartsEarly(t *testing.T) {
	dir := t.TempDir()
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = []string{"container-shim", dir}
	cmd.Env = []string{"GODEBUG=inittrace=1"}
	out, _ := cmd.CombinedOutput()
	if !strings.Contains(string(out), "init internal/bytealg ") {
		t.Fatalf("there is no trace of what was initialized: %s", out)
	}
	if exit, err := shim.ReadExit(dir); err != nil || exit.Reason != shim.StartError || !strings.Contains(exit.Message, "spec.json") {
		t.Errorf("the shim, without anything to run, left %v, %v", exit, err)
	}
	for line := range strings.Lines(string(out)) {
		if strings.HasPrefix(line, "init k8s.io/kubernetes/") || strings.HasPrefix(line, "init k8s.io/api/") || strings.HasPrefix(line, "init k8s.io/client-go/") {
			t.Errorf("was initialized first: %s", line)
		}
	}
}
