package kvstore

import (
	"fmt"
	"io"

	"go.uber.org/zap"
	"go.uber.org/zap/zapcore"
)

// expected are warnings and errors that etcd logs in the course of nature here. Nobody can
// or need do anything about them, so they would only teach people not to read the log.
var expected = map[string]bool{
	// At the first start: the data has no raft term yet, and gets one a moment later.
	"Failed to detect schema version":  true,
	"failed to update storage version": true,
	// At every start: authentication by tokens is off, certificates are what counts.
	"simple token is not cryptographically signed": true,
	// At every start: a client port for gRPC alone would need a second one for HTTP.
	"Running http and grpc server on single port. This is not recommended for production.": true,
	// Whenever a cluster asks on that was disconnected, which its nodes do until they are told; and when a request was under way while users changed,
	// whose client asks again.
	"cannot find a user for permission check":                       true,
	"request auth revision is less than current node auth revision": true,
	"ignored grant role request to a user":                          true,
	// At every stop, since the listeners are closed. Should one fail earlier, Serve returns its error.
	"setting up serving from embedded etcd failed.": true,
	"stopping secure grpc server due to error":      true,
	"stopped secure grpc server due to error":       true,
}

// serverLogger returns a logger for etcd that writes lines of text to w.
func serverLogger(level string, w io.Writer) (*zap.Logger, error) {
	l, err := zapcore.ParseLevel(level)
	if err != nil {
		return nil, fmt.Errorf("kvstore: log level %q: want debug, info, warn or error", level)
	}
	encoder := zap.NewProductionEncoderConfig()
	encoder.EncodeTime = zapcore.RFC3339TimeEncoder
	encoder.CallerKey = zapcore.OmitKey
	core := zapcore.NewCore(zapcore.NewConsoleEncoder(encoder), zapcore.Lock(zapcore.AddSync(w)), l)
	return zap.New(quietCore{core}), nil
}

// quietCore drops expected messages.
type quietCore struct {
	zapcore.Core
}

func (c quietCore) With(fields []zapcore.Field) zapcore.Core {
	return quietCore{c.Core.With(fields)}
}

func (c quietCore) Check(entry zapcore.Entry, checked *zapcore.CheckedEntry) *zapcore.CheckedEntry {
	if expected[entry.Message] {
		return checked
	}
	return c.Core.Check(entry, checked)
}
