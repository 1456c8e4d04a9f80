package install

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"

	"causeway/identity/pki"
	"causeway/kvstore"
)

// controlPlane is a real kube-apiserver and kube-controller-manager on the loopback, with RBAC and an etcd of their own.
type controlPlane struct {
	admin *rest.Config
	// userToken is of a user who may nothing.
	userToken string
}

// kubernetesProgram is Kubernetes, of which the test-bed's is taken: it is built once for all who need it.
func kubernetesProgram(t *testing.T) string {
	t.Helper()
	build := exec.Command("go", "run", "causeway/cmd/clustermesh", "testbed", "kubernetes", "build")
	build.Stderr = os.Stderr
	program, err := build.Output()
	if err != nil {
		t.Fatal("building Kubernetes: ", err)
	}
	return strings.TrimSpace(string(program))
}

func startControlPlane(t *testing.T) *controlPlane {
	t.Helper()
	program, dir := kubernetesProgram(t), t.TempDir()
	file := func(name string) string { return filepath.Join(dir, name) }
	storeAddress, serverAddress, managerAddress := freeAddress(t), freeAddress(t), freeAddress(t)
	if _, err := pki.Ensure(file("pki"), "kubernetes", []string{"127.0.0.1"}, time.Now()); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(context.Background())
	ready, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		ended <- kvstore.Serve(ctx, kvstore.ServerConfig{
			DataDir: file("etcd"), ListenClient: storeAddress, CAFile: file("pki/ca.crt"), CertFile: file("pki/server.crt"), KeyFile: file("pki/server.key"),
			UnsafeNoFsync: true, LogLevel: "error", Ready: func(a net.Addr) { ready <- a },
		})
	}()
	t.Cleanup(func() { stop(); <-ended }) // after the API server, which hangs without it
	select {
	case <-ready:
	case err := <-ended:
		ended <- err
		t.Fatal("etcd: ", err)
	}

	write(t, file("sa.key"), newKey(t))
	write(t, file("tokens.csv"), []byte("admin-token,admin,admin,system:masters\nuser-token,user,user\n"))
	host, port, _ := net.SplitHostPort(serverAddress)
	runProgram(t, program, "kube-apiserver", "--etcd-servers=https://"+storeAddress, "--etcd-cafile="+file("pki/ca.crt"), "--etcd-certfile="+file("pki/agent.crt"), "--etcd-keyfile="+file("pki/agent.key"),
		"--bind-address="+host, "--secure-port="+port, "--cert-dir="+file("server"), "--authorization-mode=RBAC", "--token-auth-file="+file("tokens.csv"), "--anonymous-auth=false",
		"--service-account-key-file="+file("sa.key"), "--service-account-signing-key-file="+file("sa.key"), "--service-account-issuer=https://kubernetes.default.svc",
		"--service-cluster-ip-range=10.96.0.0/16", "--allow-privileged=true", "--endpoint-reconciler-type=none")
	c := &controlPlane{
		admin:     &rest.Config{Host: "https://" + serverAddress, BearerToken: "admin-token", TLSClientConfig: rest.TLSClientConfig{Insecure: true}},
		userToken: "user-token",
	}
	client, err := kubernetes.NewForConfig(c.admin)
	if err != nil {
		t.Fatal(err)
	}
	eventually(t, "the API server is ready", func() bool {
		code := 0
		client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(t.Context()).StatusCode(&code)
		return code == http.StatusOK
	})
	write(t, file("kubeconfig"), fmt.Appendf(nil, "apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: %q, insecure-skip-tls-verify: true}}]\n"+
		"users: [{name: c, user: {token: admin-token}}]\ncontexts: [{name: c, context: {cluster: c, user: c}}]\n", c.admin.Host))
	_, managerPort, _ := net.SplitHostPort(managerAddress)
	runProgram(t, program, "kube-controller-manager", "--kubeconfig="+file("kubeconfig"), "--bind-address=127.0.0.1", "--secure-port="+managerPort, "--cert-dir="+file("manager"),
		"--leader-elect=false", "--service-account-private-key-file="+file("sa.key"), "--use-service-account-credentials=false")
	return c
}

// runProgram runs one of Kubernetes' programs until the test ends, and shows what it said if the test fails.
func runProgram(t *testing.T, program string, args ...string) {
	t.Helper()
	var log bytes.Buffer
	cmd := exec.Command(program, args...)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGKILL)
		_ = cmd.Wait()
		if t.Failed() {
			out := log.Bytes()
			t.Logf("%s: %s", args[0], out[max(0, len(out)-4000):])
		}
	})
}

func newKey(t *testing.T) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: der})
}

func write(t *testing.T, file string, content []byte) {
	t.Helper()
	if err := os.WriteFile(file, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func freeAddress(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// eventually polls what has no channel to wait for.
func eventually(t *testing.T, what string, cond func() bool) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for !cond() {
		if time.Now().After(deadline) {
			t.Fatalf("not in time: %s", what)
		}
		time.Sleep(50 * time.Millisecond)
	}
}
