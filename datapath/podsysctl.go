package datapath

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"runtime"
	"strings"

	"github.com/vishvananda/netns"
)

// addrGenNone is the addr_gen_mode of a link that makes no IPv6 addresses by itself.
const addrGenNone = "1"

// setHostSysctls keeps the node's end of a veth from having an IPv6 address of its own, by which a pod could reach the node around
// the pod program. Without IPv6 addresses of the pod, it needs no IPv6 at all.
func setHostSysctls(cfg PodLinkConfig) error {
	link := "ipv6/conf/" + cfg.HostLink + "/"
	if !cfg.hasIPv6() {
		err := setSysctl(link+"disable_ipv6", "1")
		if errors.Is(err, fs.ErrNotExist) {
			return nil // The kernel has no IPv6.
		}
		return err
	}
	return setSysctls([][2]string{
		{link + "addr_gen_mode", addrGenNone},
		{link + "accept_ra", "0"},
		{link + "disable_ipv6", "0"},
	})
}

// setPodSysctls makes the pod's end of a veth have the IPv6 address that it is given, and at once, whatever the machine's
// defaults are; nobody sends advertisements there that it could listen to.
func setPodSysctls(pod netns.NsHandle, cfg PodLinkConfig) error {
	if !cfg.hasIPv6() {
		return nil
	}
	link := "ipv6/conf/" + cfg.podInterface() + "/"
	return inNamespace(pod, func() error {
		return setSysctls([][2]string{
			{"ipv6/conf/lo/disable_ipv6", "0"},
			{link + "accept_dad", "0"},
			{link + "accept_ra", "0"},
			{link + "disable_ipv6", "0"},
		})
	})
}

// inNamespace runs do on a thread of its own that is in the network namespace, and ends with it.
func inNamespace(ns netns.NsHandle, do func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread() // Never unlocked, so the runtime ends the thread.
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("entering the network namespace: %w", err)
			return
		}
		done <- do()
	}()
	return <-done
}

func setSysctls(all [][2]string) error {
	for _, s := range all {
		if err := setSysctl(s[0], s[1]); err != nil {
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("the kernel has no IPv6: boot it without ipv6.disable=1, or give the node no IPv6 pod range: %w", err)
			}
			return err
		}
	}
	return nil
}

// setSysctl sets net/path, which /proc/sys shows as it is in the calling thread's network namespace.
func setSysctl(path, value string) error {
	file := "/proc/sys/net/" + path
	old, err := os.ReadFile(file)
	if err == nil && strings.TrimSpace(string(old)) == value {
		return nil // Also where /proc/sys is read-only.
	}
	if err == nil {
		err = os.WriteFile(file, []byte(value), 0o644)
	}
	if err != nil {
		return fmt.Errorf("setting sysctl net/%s to %s: %w", path, value, err)
	}
	return nil
}
