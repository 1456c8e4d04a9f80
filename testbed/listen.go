package testbed

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"strings"
)

// tcpListen is the state TCP_LISTEN in /proc/net/tcp.
const tcpListen = "0A"

// listens tells whether any socket of a network namespace listens on a TCP port.
func listens(ns string, port uint16) (found bool, err error) {
	err = inNS(ns, func() error {
		for _, table := range []string{"tcp", "tcp6"} {
			b, err := os.ReadFile("/proc/thread-self/net/" + table)
			if errors.Is(err, fs.ErrNotExist) {
				continue // a kernel without IPv6
			}
			if err != nil {
				return fmt.Errorf("reading the sockets of %s: %w", ns, err)
			}
			found = found || listensIn(string(b), port)
		}
		return nil
	})
	return found, err
}

// listensIn looks for a listener in the text of /proc/net/tcp or tcp6: "sl local_address rem_address st …".
func listensIn(table string, port uint16) bool {
	for line := range strings.Lines(table) {
		f := strings.Fields(line)
		if len(f) < 4 || f[3] != tcpListen {
			continue
		}
		_, hex, _ := cutLast(f[1], ":")
		if n, err := strconv.ParseUint(hex, 16, 16); err == nil && uint16(n) == port {
			return true
		}
	}
	return false
}
