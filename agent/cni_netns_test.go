package agent

import (
	"bufio"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/types"

	"causeway/datapath"
)

// Environment of the test's own binary when it is a node or a pod, each in a network namespace of its own.
const (
	beNode = "CAUSEWAY_TEST_BE_NODE"
	bePod  = "CAUSEWAY_TEST_BE_POD"
)

// podPort is where pods answer.
const podPort = 8080

// TestCNIInNetworkNamespaces runs the agent's end of it with the kernel's own links: the test runs itself again in a network namespace, which is the node.
func TestCNIInNetworkNamespaces(t *testing.T) {
	switch {
	case os.Getenv(beNode) != "":
		testCNIOnNode(t)
		return
	case os.Geteuid() != 0 && os.Getenv("CI") == "true":
		t.Fatal("needs root")
	case os.Geteuid() != 0:
		t.Skip("needs root, for network namespaces")
	}
	node := exec.Command("/proc/self/exe", "-test.run=^"+t.Name()+"$", "-test.count=1", "-test.v")
	node.Env = append(os.Environ(), beNode+"=1")
	node.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	out, err := node.CombinedOutput()
	if err != nil || !strings.Contains(string(out), "--- PASS: "+t.Name()) {
		t.Errorf("%v\n%s", err, out)
	}
}

// runTestPod is a pod's process: on each connection it connects to the address that it is sent, and says from where it did.
func runTestPod() error {
	listener, err := net.Listen("tcp", fmt.Sprintf(":%d", podPort))
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, os.Stdin) // ends with the test
		os.Exit(0)
	}()
	fmt.Println("ready")
	for {
		conn, err := listener.Accept()
		if err != nil {
			return err
		}
		go func() {
			defer conn.Close()
			target, err := bufio.NewReader(conn).ReadString('\n')
			if err != nil {
				return
			}
			out, err := net.DialTimeout("tcp", strings.TrimSpace(target), patience)
			if err != nil {
				fmt.Fprintln(conn, err)
				return
			}
			defer out.Close()
			fmt.Fprintln(conn, out.LocalAddr().(*net.TCPAddr).AddrPort().Addr().Unmap())
		}()
	}
}

// startTestPod returns the path of the network namespace of a new pod.
func startTestPod(t *testing.T) string {
	t.Helper()
	pod := exec.Command("/proc/self/exe")
	pod.Env = append(os.Environ(), bePod+"=1")
	pod.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET}
	pod.Stderr = os.Stderr
	stdin, err := pod.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	stdout, err := pod.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := pod.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		stdin.Close()
		_ = pod.Wait()
	})
	if line, err := bufio.NewReader(stdout).ReadString('\n'); line != "ready\n" {
		t.Fatalf("the pod says %q, %v", line, err)
	}
	return fmt.Sprintf("/proc/%d/ns/net", pod.Process.Pid)
}

// shell runs a command on the node, or with a path in that network namespace.
func shell(t *testing.T, netns, command string) {
	t.Helper()
	c := exec.Command("sh", "-ec", command)
	if netns != "" {
		c = exec.Command("nsenter", "--net="+netns, "sh", "-ec", command)
	}
	if out, err := c.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", command, err, out)
	}
}

// reaches asserts that the node reaches a pod, and the pod the node, at an address of the same family.
func reaches(t *testing.T, pod, node netip.Addr) {
	t.Helper()
	listener, err := net.ListenTCP("tcp", net.TCPAddrFromAddrPort(netip.AddrPortFrom(node, 0)))
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	conn, err := net.DialTimeout("tcp", netip.AddrPortFrom(pod, podPort).String(), patience)
	if err != nil {
		t.Errorf("the node does not reach the pod: %v", err)
		return
	}
	defer conn.Close()
	fmt.Fprintln(conn, listener.Addr())
	if said, err := bufio.NewReader(conn).ReadString('\n'); err != nil || strings.TrimSpace(said) != pod.String() {
		t.Errorf("the pod reaches the node from %q (%v), want from %s", said, err, pod)
	}
}

func testCNIOnNode(t *testing.T) {
	node4, node6 := netip.MustParseAddr("172.29.1.11"), netip.MustParseAddr("fd00:29::11")
	shell(t, "", fmt.Sprintf("ip link set lo up; ip address add %s/32 dev lo; ip address add %s/128 dev lo nodad", node4, node6))
	n := newCNINode(t)
	t.Setenv(pluginLinks, "") // the kernel's
	n.links = kernelLinks{}
	n.start(t)
	connected := func(what string, s *libcni.RuntimeConf) {
		t.Helper()
		if err := n.check(t, s); err != nil {
			t.Errorf("CHECK %s: %v", what, err)
		}
		ep, ok := n.pods.get("default/shop-1")
		if !ok || ep.Interface != s.IfName {
			t.Fatalf("%s the endpoint is %+v", what, ep)
		}
		reaches(t, ep.Address, node4)
		reaches(t, ep.Address6, node6)
	}
	gone := func(what string, s *libcni.RuntimeConf, hostLink string) {
		t.Helper()
		if _, err := datapath.LookAtPodEnd(s.NetNS, s.IfName); err == nil {
			t.Errorf("%s the pod still has its interface", what)
		}
		if _, ok, err := datapath.PodLinkExists(hostLink); ok || err != nil {
			t.Errorf("%s the node still has its end (%v)", what, err)
		}
	}

	one := sandboxAt(startTestPod(t), "one", "default/shop-1", "uid-1")
	result := n.add(t, one)
	hostLink := result.Interfaces[0].Name
	connected("at first", one)
	n.add(t, one)
	connected("again", one)
	n.restart(t)
	connected("after a restart", one)

	shell(t, one.NetNS, "ip -6 route del default")
	refused(t, "without a default route", n.check(t, one), types.ErrInternal, "has lost the default route for fd00:10:0:1::2")

	two := sandboxAt(startTestPod(t), "two", "default/shop-1", "uid-1")
	two.IfName = "net1.5"
	shell(t, two.NetNS, "echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6; echo 2 >/proc/sys/net/ipv6/conf/default/accept_dad")
	n.add(t, two)
	connected("in another sandbox, which had no IPv6,", two)
	if _, err := datapath.LookAtPodEnd(one.NetNS, one.IfName); err == nil {
		t.Error("the former sandbox still has its interface")
	}
	n.del(t, one)
	connected("after DEL of the former sandbox", two)

	n.stop()
	n.del(t, two)
	gone("after DEL without an agent", two, hostLink)
	n.start(t)
	if got := n.sandboxes(); got != "" {
		t.Errorf("the next agent has %s", got)
	}
	n.add(t, two)
	connected("after that", two)
	n.del(t, two)
	gone("after DEL", two, hostLink)

	shell(t, two.NetNS, "ip link add net1.5 type bridge")
	_, err := n.tryAdd(t, two)
	refused(t, "an interface that is there", err, types.ErrInternal, "an interface net1.5 already that is not Causeway's")
	_, err = n.tryAdd(t, sandboxAt("/proc/self/ns/net", "three", "default/shop-1", "uid-1"))
	refused(t, "the node's own network namespace", err, types.ErrInternal, "the network namespace of the node itself")
	if got := n.sandboxes(); got != "" {
		t.Errorf("after refusals the agent has %s", got)
	}
}
