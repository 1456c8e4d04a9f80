package testbed

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"
)

const (
	// sendTimeout of one request. A new connection to a dead node would wait for minutes.
	sendTimeout = 2 * time.Second
	// sendEnd is what a client gets to count the requests in flight when it is told to end.
	sendEnd = sendTimeout + 8*time.Second
)

// send has a client's pod send requests to the service at its cluster's address, each on a connection of its own, until the
// function that it returns is called. That returns nil if the client was killed.
func (w *bedWorld) send(from Target, rate float64) (stop func() (*LoadResult, error), err error) {
	url := "http://" + w.addresses[from.Cluster].String() + "/"
	var out, stderr bytes.Buffer
	// It ends by a signal of ours alone, so that what it has counted is not lost with a context.
	cmd, err := w.bed.startExec(context.Background(), from, []string{
		"clustermesh", "testbed", "load", "--url", url, "--rate", strconv.FormatFloat(rate, 'g', -1, 64),
		"--duration", "24h", "--timeout", sendTimeout.String(), "-o", "json",
	}, Stdio{Out: &out, Err: &stderr})
	if err != nil {
		return nil, err
	}
	return func() (*LoadResult, error) {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it may have been killed
		timer := time.AfterFunc(sendEnd, func() { _ = cmd.Process.Kill() })
		defer timer.Stop()
		err := cmd.Wait()
		var exit *exec.ExitError
		if errors.As(err, &exit) && exit.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL {
			return nil, nil
		}
		result := new(LoadResult)
		if jsonErr := json.Unmarshal(out.Bytes(), result); jsonErr != nil {
			return nil, fmt.Errorf("the client of %s told nothing of its requests (%w): %s", from.Cluster, errors.Join(err, jsonErr), strings.TrimSpace(stderr.String()))
		}
		return result, nil
	}, nil
}
