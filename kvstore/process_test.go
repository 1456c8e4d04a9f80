package kvstore

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// serverEnv makes the test binary run an etcd server instead of the tests: a process
// of its own can be killed as a real one would be.
const serverEnv = "CAUSEWAY_KVSTORE_TEST_SERVER"

func TestMain(m *testing.M) {
	if config := os.Getenv(serverEnv); config != "" {
		os.Exit(serverMain(config))
	}
	goleak.VerifyTestMain(m)
}

func serverMain(config string) int {
	var p processConfig
	if err := json.Unmarshal([]byte(config), &p); err != nil {
		fmt.Println(err)
		return 2
	}
	cfg := ServerConfig{
		DataDir: p.DataDir, ListenClient: p.ListenClient, CAFile: p.CAFile, CertFile: p.CertFile, KeyFile: p.KeyFile,
		Name: p.Name, Members: p.Members, ListenHealth: p.ListenHealth,
		UnsafeNoFsync: true, LogLevel: "error",
		Limited: func(user string) bool { return strings.HasPrefix(user, "peer-") },
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cfg.Ready = func(net.Addr) { fmt.Println("ready") }
	if err := Serve(ctx, cfg); err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// processConfig is the part of a ServerConfig that tests set.
type processConfig struct {
	DataDir, ListenClient, CAFile, CertFile, KeyFile string
	Name, ListenHealth                               string
	Members                                          MembersConfig
}

// process is an etcd server in a process of its own.
type process struct {
	config processConfig
	client Config
	ca     *testCA
	cmd    *exec.Cmd
	stdout *bufio.Reader
}

// startProcess starts a server with a new data directory on a free port.
func startProcess(t testing.TB) *process {
	t.Helper()
	ca := newTestCA(t)
	p := &process{ca: ca, config: processConfig{DataDir: t.TempDir(), ListenClient: freeAddress(t), CAFile: ca.file}}
	p.config.CertFile, p.config.KeyFile = ca.issue(t, "server")
	p.client = Config{Endpoints: []string{p.config.ListenClient}, CAFile: ca.file}
	p.client.CertFile, p.client.KeyFile = ca.issue(t, "client")
	p.start(t)
	t.Cleanup(p.kill)
	return p
}

// start returns once the server is ready.
func (p *process) start(t testing.TB) {
	t.Helper()
	p.begin(t)
	p.waitReady(t)
}

// begin does not wait: members get ready together.
func (p *process) begin(t testing.TB) {
	t.Helper()
	config, err := json.Marshal(p.config)
	if err != nil {
		t.Fatal(err)
	}
	p.cmd = exec.Command(os.Args[0])
	p.cmd.Env = append(os.Environ(), serverEnv+"="+string(config))
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	p.cmd.Stderr = os.Stderr
	stdout, err := p.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p.stdout = bufio.NewReader(stdout)
}

func (p *process) waitReady(t testing.TB) {
	t.Helper()
	if line, err := p.stdout.ReadString('\n'); strings.TrimSpace(line) != "ready" {
		p.kill()
		t.Fatalf("server did not start: %q, %v", line, err)
	}
}

func (p *process) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// kill is kill -9.
func (p *process) kill() {
	if p.cmd != nil {
		p.cmd.Process.Kill()
		p.cmd.Wait()
		p.cmd = nil
	}
}

// wipe removes the data of a server that isn't running.
func (p *process) wipe(t testing.TB) {
	t.Helper()
	if err := os.RemoveAll(p.config.DataDir); err != nil {
		t.Fatal(err)
	}
}

// dial returns a Store on the server; change, if not nil, edits its configuration.
func (p *process) dial(t testing.TB, change func(*Config)) Store {
	t.Helper()
	cfg := p.client
	if change != nil {
		change(&cfg)
	}
	store, err := Dial(context.Background(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := store.Close(); err != nil {
			t.Error(err)
		}
	})
	return store
}

func freeAddress(t testing.TB) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// eventually polls what has no channel to wait for.
func eventually(t testing.TB, within time.Duration, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(within)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", within, what)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
