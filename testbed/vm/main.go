// Command vm runs a test binary on another kernel, in a virtual machine whose only programs are this one and that binary:
//
//	go test -exec "vm -kernel DIR" ./datapath
//
// DIR is an unpacked kernel package of a distribution: "boot/vmlinuz-VERSION" and "lib/modules/VERSION". "go tool task test:kernels" gets some.
// The machine is emulated, so it works inside of virtual machines too, and is slow: about 4 s to boot, and tests take several times as long.
//
// What the test prints comes out as it does, and the exit code is the test's. It is run as root, with an empty environment but for
// CI and those variables that -env names.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if os.Getpid() == 1 {
		guest() // does not return
	}
	var m machine
	flag.StringVar(&m.kernel, "kernel", "", "`directory` of an unpacked kernel package")
	flag.DurationVar(&m.timeout, "timeout", 20*time.Minute, "time after which the machine is switched off")
	flag.IntVar(&m.memory, "memory", 2048, "memory of the machine, in MiB")
	env := flag.String("env", "", "names of environment variables that the test gets, separated by commas")
	flag.Parse()
	if m.kernel == "" || flag.NArg() == 0 {
		fmt.Fprintln(os.Stderr, "usage: vm -kernel DIR [flags] BINARY [ARGUMENTS]")
		flag.PrintDefaults()
		os.Exit(2)
	}
	m.env = []string{"CI=" + os.Getenv("CI")}
	for _, name := range strings.FieldsFunc(*env, func(r rune) bool { return r == ',' }) {
		m.env = append(m.env, name+"="+os.Getenv(name))
	}
	m.binary, m.arguments = flag.Arg(0), flag.Args()[1:]
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, unix.SIGTERM)
	code, err := m.run(ctx, os.Stdout)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "vm:", err)
		code = 1
	}
	os.Exit(code)
}
