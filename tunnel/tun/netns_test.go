package tun

import (
	"fmt"
	"os"
	"runtime"
	"testing"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
)

func TestMain(m *testing.M) {
	if os.Getuid() != 0 {
		fmt.Fprintln(os.Stderr, "LEFT OUT: every test of TUN devices in the kernel, because they need root.")
		if os.Getenv("CI") == "true" {
			os.Exit(1)
		}
	}
	os.Exit(m.Run())
}

// namespace is a network namespace without a name, which goes when it is closed.
type namespace struct{ handle netns.NsHandle }

func newNamespace(t testing.TB) namespace {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root")
	}
	n := namespace{}
	onThread(func() {
		var err error
		if n.handle, err = netns.New(); err != nil {
			t.Errorf("making a network namespace: %v", err)
		}
	})
	if t.Failed() {
		t.FailNow()
	}
	t.Cleanup(func() { n.handle.Close() })
	n.do(t, func() { up(t, "lo") })
	return n
}

// do runs f on a thread that is in the namespace.
func (n namespace) do(t testing.TB, f func()) {
	t.Helper()
	onThread(func() {
		if err := netns.Set(n.handle); err != nil {
			t.Errorf("entering a network namespace: %v", err)
			return
		}
		f()
	})
	if t.Failed() {
		t.FailNow()
	}
}

// onThread runs f on a thread of its own, which ends with f.
func onThread(f func()) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// must reports an error without ending the goroutine, which may not be the test's.
func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
}

func attrs(name string) netlink.LinkAttrs {
	a := netlink.NewLinkAttrs()
	a.Name = name
	return a
}

func up(t testing.TB, name string) {
	t.Helper()
	link, err := netlink.LinkByName(name)
	if err != nil {
		t.Errorf("finding %s: %v", name, err)
		return
	}
	must(t, netlink.LinkSetUp(link))
}

// sysctl switches one on or off in the thread's namespace.
func sysctl(name string, on bool) error {
	value := "0"
	if on {
		value = "1"
	}
	return os.WriteFile("/proc/sys/"+name, []byte(value), 0o644)
}
