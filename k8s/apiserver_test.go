package k8s

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// apiServer is a real kube-apiserver on loopback, with an etcd of its own.
type apiServer struct {
	dir     string
	address string // host:port
	etcd    string
	program string
	cmd     *exec.Cmd
	log     *bytes.Buffer
	client  *kubernetes.Clientset
}

// adminToken is that of a user who may do everything, guestToken of one who may do nothing.
const adminToken, guestToken = "admin-secret", "guest-secret"

// kubernetesProgram is what runs kube-apiserver: the test-bed's, built once for all who need it.
var kubernetesProgram = sync.OnceValues(func() (string, error) {
	build := exec.Command("go", "run", "causeway/cmd/clustermesh", "testbed", "kubernetes", "build")
	build.Stderr = os.Stderr
	program, err := build.Output()
	if err != nil {
		return "", fmt.Errorf("building Kubernetes: %w", err)
	}
	return strings.TrimSpace(string(program)), nil
})

// startAPIServer starts one, which the test ends.
func startAPIServer(t testing.TB) *apiServer {
	t.Helper()
	if testing.Short() {
		t.Skip("it runs a real API server")
	}
	program, err := kubernetesProgram()
	if err != nil {
		t.Fatal(err)
	}
	s := &apiServer{dir: t.TempDir(), program: program}
	if _, err := pki.Ensure(s.dir, "east", nil, time.Now()); err != nil {
		t.Fatal(err)
	}
	s.write(t, "tokens.csv", adminToken+",admin,1,system:masters\n"+guestToken+",guest,2\n")
	s.startEtcd(t)
	s.address = freeAddress(t)
	s.start(t)
	t.Cleanup(s.kill)
	s.client, err = kubernetes.NewForConfig(&rest.Config{
		Host: "https://" + s.address, BearerToken: adminToken, TLSClientConfig: rest.TLSClientConfig{CAFile: s.file("ca.crt")}, QPS: 1000, Burst: 1000,
	})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func (s *apiServer) file(name string) string { return filepath.Join(s.dir, name) }

func (s *apiServer) write(t testing.TB, name, content string) string {
	t.Helper()
	if err := os.WriteFile(s.file(name), []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return s.file(name)
}

func (s *apiServer) startEtcd(t testing.TB) {
	t.Helper()
	ctx, stop := context.WithCancel(context.Background())
	ready, done := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		done <- kvstore.Serve(ctx, kvstore.ServerConfig{
			DataDir: s.file("etcd"), ListenClient: "127.0.0.1:0",
			CAFile: s.file("ca.crt"), CertFile: s.file("server.crt"), KeyFile: s.file("server.key"), UnsafeNoFsync: true, LogLevel: "error",
			Ready: func(a net.Addr) { ready <- a },
		})
	}()
	t.Cleanup(func() { stop(); <-done })
	select {
	case a := <-ready:
		s.etcd = a.String()
	case err := <-done:
		t.Fatal(err)
	}
}

// start runs the program and returns when it is ready.
func (s *apiServer) start(t testing.TB) {
	t.Helper()
	s.log = &bytes.Buffer{}
	s.cmd = exec.Command(s.program, "kube-apiserver",
		"--bind-address=127.0.0.1", "--secure-port="+s.address[strings.LastIndex(s.address, ":")+1:],
		"--etcd-servers=https://"+s.etcd, "--etcd-cafile="+s.file("ca.crt"), "--etcd-certfile="+s.file("agent.crt"), "--etcd-keyfile="+s.file("agent.key"),
		"--tls-cert-file="+s.file("server.crt"), "--tls-private-key-file="+s.file("server.key"),
		"--token-auth-file="+s.file("tokens.csv"), "--authorization-mode=RBAC",
		"--service-account-issuer=https://kubernetes.default.svc", "--service-account-key-file="+s.file("server.crt"), "--service-account-signing-key-file="+s.file("server.key"),
		"--service-cluster-ip-range=10.96.0.0/16,fd00:96::/108", "--endpoint-reconciler-type=none", "--disable-admission-plugins=ServiceAccount",
		"--profiling=false", "--v=0")
	s.cmd.Stdout, s.cmd.Stderr = s.log, s.log
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(time.Minute)
	for !s.ready() {
		if time.Now().After(deadline) {
			s.kill()
			t.Fatalf("the API server does not get ready: %s", s.log)
		}
		time.Sleep(50 * time.Millisecond) // it says so nowhere else
	}
}

func (s *apiServer) ready() bool {
	ca, err := os.ReadFile(s.file("ca.crt"))
	if err != nil {
		return false
	}
	roots := x509.NewCertPool()
	roots.AppendCertsFromPEM(ca)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequest(http.MethodGet, "https://"+s.address+"/readyz", nil)
	if err != nil {
		return false
	}
	request.Header.Set("Authorization", "Bearer "+adminToken)
	response, err := (&http.Client{Transport: transport, Timeout: time.Second}).Do(request)
	if err != nil {
		return false
	}
	response.Body.Close()
	return response.StatusCode == http.StatusOK
}

// kill ends it at once.
func (s *apiServer) kill() {
	if s.cmd != nil {
		_ = s.cmd.Process.Kill()
		_ = s.cmd.Wait()
		s.cmd = nil
	}
}

// kubeconfig writes one whose current context is the token's user.
func (s *apiServer) kubeconfig(t testing.TB, token string) string {
	t.Helper()
	return s.write(t, "kubeconfig-"+token, fmt.Sprintf(`apiVersion: v1
kind: Config
clusters: [{name: east, cluster: {server: "https://%s", certificate-authority: ca.crt}}]
users: [{name: user, user: {token: %s}}]
contexts: [{name: east, context: {cluster: east, user: user}}]
current-context: east
`, s.address, token))
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
