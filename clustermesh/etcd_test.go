package clustermesh

import (
	"bufio"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"causeway/kvstore"
)

// serverEnv makes the test binary run an etcd server in a directory instead of the tests: a process of its own can be killed as a real one would be.
const serverEnv = "CAUSEWAY_CLUSTERMESH_TEST_SERVER"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serverEnv); dir != "" {
		os.Exit(serverMain(dir))
	}
	goleak.VerifyTestMain(m)
}

func serverMain(dir string) int {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	cert, key := filepath.Join(dir, "cert.pem"), filepath.Join(dir, "key.pem")
	err := kvstore.Serve(ctx, kvstore.ServerConfig{
		DataDir: filepath.Join(dir, "data"), ListenClient: os.Getenv(serverEnv + "_LISTEN"), UnsafeNoFsync: true, LogLevel: "error",
		CAFile: cert, CertFile: cert, KeyFile: key, Ready: func(net.Addr) { fmt.Println("ready") },
	})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	return 0
}

// etcd is a server in a process of its own.
type etcd struct {
	dir, address string
	cmd          *exec.Cmd
}

func startEtcd(t testing.TB) *etcd {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	e := &etcd{dir: t.TempDir(), address: l.Addr().String()}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	writeSelfSigned(t, e.dir)
	e.start(t)
	t.Cleanup(e.kill)
	return e
}

// start returns once the server is ready.
func (e *etcd) start(t testing.TB) {
	t.Helper()
	e.cmd = exec.Command(os.Args[0])
	e.cmd.Env = append(os.Environ(), serverEnv+"="+e.dir, serverEnv+"_LISTEN="+e.address)
	e.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	e.cmd.Stderr = os.Stderr
	stdout, err := e.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := e.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("etcd says %q, %v", line, err)
	}
}

func (e *etcd) kill() {
	_ = e.cmd.Process.Kill()
	_ = e.cmd.Wait()
}

// wipe has the killed server begin with nothing.
func (e *etcd) wipe(t testing.TB) {
	t.Helper()
	if err := os.RemoveAll(filepath.Join(e.dir, "data")); err != nil {
		t.Fatal(err)
	}
}

// open returns a client, which may reach the server in another way.
func (e *etcd) open(t testing.TB, dial func(context.Context, string) (net.Conn, error)) kvstore.Store {
	t.Helper()
	cert, key := filepath.Join(e.dir, "cert.pem"), filepath.Join(e.dir, "key.pem")
	s, err := kvstore.Dial(context.Background(), kvstore.Config{Endpoints: []string{e.address}, CAFile: cert, CertFile: cert, KeyFile: key, Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

// writeSelfSigned makes a certificate that is its own authority, and serves both sides.
func writeSelfSigned(t testing.TB, dir string) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
	}
	cert, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	for file, block := range map[string]*pem.Block{"cert.pem": {Type: "CERTIFICATE", Bytes: cert}, "key.pem": {Type: "PRIVATE KEY", Bytes: der}} {
		if err := os.WriteFile(filepath.Join(dir, file), pem.EncodeToMemory(block), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
